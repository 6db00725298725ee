"""The paper's tables of memory: what is planned is what the paper's formulas give, and the page tells what is not."""

import pytest

from experiments.paper_memory.comparison import cells, paper, with_early_zeroing
from experiments.paper_memory.jobs import BEYOND, LLAMA7B, OTHERS, Job, planned
from experiments.paper_memory.summary import summary

WIDTH, INTERMEDIATE, LAYERS, VOCABULARY = 64, 192, 3, 96
LAYER = 4 * WIDTH**2 + 3 * WIDTH * INTERMEDIATE + 2 * WIDTH
NUMEL = LAYERS * LAYER + 2 * VOCABULARY * WIDTH + WIDTH
SMALL = tuple(
    f"model.network.config.{name}={value}"
    for name, value in {
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }.items()
)
STATES = {"AdamW": 2, "SGDM": 1, "SGD": 0, "Adagrad": 1}


def planned_small(optimizer, precision, method, **strategy):
    job = Job("LLaMA-7B", optimizer, precision, method, strategy, overrides=SMALL)
    return planned(job, batch=2, length=16)


@pytest.mark.parametrize("optimizer", STATES)
def test_hift_has_gradients_and_states_of_the_largest_block_only(optimizer):
    row = planned_small(optimizer, "fp32", "HiFT")
    assert (row["numel"], row["largest_block_numel"]) == (NUMEL, LAYER)
    assert row["parameters"] == 4 * NUMEL
    assert row["gradients"] == 4 * LAYER
    assert row["states"] == 4 * STATES[optimizer] * LAYER


def test_full_fine_tuning_has_them_all():
    row = planned_small("AdamW", "mixed", "full")
    assert (row["parameters"], row["gradients"], row["states"]) == (4 * NUMEL, 4 * NUMEL, 8 * NUMEL)


@pytest.mark.parametrize("optimizer", STATES)
def test_high_precision_mixed_has_16_bit_weights_and_fp32_masters_and_states_of_the_largest_block(optimizer):
    row = planned_small(optimizer, "Mixed^Hi", "HiFT")
    assert row["parameters"] == 2 * NUMEL + 4 * LAYER
    assert row["gradients"] == 2 * LAYER
    assert row["states"] == 4 * STATES[optimizer] * LAYER


def test_adafactor_has_a_row_and_a_column_of_state_for_each_matrix():
    matrices = [(WIDTH, WIDTH)] * 4 + [(INTERMEDIATE, WIDTH)] * 2 + [(WIDTH, INTERMEDIATE)]
    row = planned_small("Adafactor", "fp32", "HiFT")
    assert row["states"] == 4 * (sum(map(sum, matrices)) + 2 * WIDTH)


def test_checkpointing_lowers_the_peak_of_full_fine_tuning_too():
    without, with_checkpointing = (planned_small("SGD", "fp32", m) for m in ("full", "full, checkpointing"))
    assert with_checkpointing["peak"] < without["peak"]


def numbers_of(paper_row):
    """Parameters of the model and of its largest block, as the paper has them."""
    if paper_row["parameters_mib"]:
        return 6738.42e6, 202.38e6
    return tuple(float(words.split()[-1]) * 1e6 for words in paper_row["source"].split(" M ")[:2])


def test_the_papers_figures_follow_from_its_formulas_and_add_up():
    rows = paper()
    assert set(rows) == {*LLAMA7B.rows, *OTHERS.rows}
    for name, row in rows.items():
        _, optimizer, precision, method = name.split(", ")
        if row["parameters_mib"]:
            counted = sum(float(row[f"{part}_mib"]) for part in ("parameters", "gradients", "states"))
            assert counted / 1024 == pytest.approx(float(row["pgs_gib"]), abs=0.011)
            total = float(row["pgs_gib"]) + float(row["residual_gib"])
            assert total == pytest.approx(float(row["total_gib"]), abs=0.021)
        numel, largest = numbers_of(row)
        weights = {"fp32": 4 * numel, "mixed": 6 * numel, "Mixed^Hi": 2 * numel + 4 * largest}[precision]
        updated = numel if method == "full" else largest
        by_formula = weights + 4 * (1 + STATES.get(optimizer, 0)) * updated
        assert by_formula / 2**30 == pytest.approx(float(row["pgs_gib"]), abs=0.016)


def record(names):
    """Rows as they would be by the formulas, counted as torch counts."""
    rows = {}
    for name in names:
        numel, largest = numbers_of(paper().get(name, {"parameters_mib": "LLaMA-7B"}))
        optimizer = name.split(", ")[1] if name in paper() else "AdamW"
        updated = int(numel if "full" in name else largest)
        high = "Mixed^Hi" in name
        states = 11345592 if updated == numel else 346030
        row = {
            "numel": int(numel),
            "largest_block_numel": int(largest),
            "parameters": int(2 * numel + 4 * largest if high else 4 * numel),
            "gradients": (2 if high else 4) * updated,
            "states": states if optimizer == "Adafactor" else 4 * STATES[optimizer] * updated,
            "peak": 3 * 10**11,
            "peak_block": "all",
            "peak_phase": "forward",
            **{f"at_peak_{role}": 10**9 for role in ("weights", "activations", "logits", "temporary")},
            **dict.fromkeys(("forward", "backward", "update"), 10**11),
            "gflop": 1.0,
        }
        rows[name] = {key: str(value) for key, value in row.items()}
    return rows


def test_counted_cells_agree_once_the_paper_is_counted_as_torch_counts():
    found = [cell for cell in cells(paper(), record(LLAMA7B.rows)) if cell.column not in ("residual", "total")]
    assert {(cell.column, cell.words[2]) for cell in found if not cell.agrees} == {
        ("parameters", "mixed"),
        ("pgs", "mixed"),
        ("gradients", "Mixed^Hi"),
        ("pgs", "Mixed^Hi"),
    }
    assert all(cell.explained for cell in found)


def test_the_page_gives_no_reason_for_what_the_reason_does_not_account_for():
    as_counted, wrong = record(LLAMA7B.rows), record(LLAMA7B.rows)
    wrong["LLaMA-7B, SGDM, mixed, HiFT"]["states"] = "1"
    others, beyond = record(OTHERS.rows), record(BEYOND.rows)
    page = summary(paper(), as_counted, others, beyond)
    assert "| not known |" not in page
    assert "In fp32: 40 of 40. States under every precision: 25 of 25." in page
    page = summary(paper(), wrong, others, beyond)
    assert "In fp32: 40 of 40. States under every precision: 24 of 25." in page
    assert "| states | mixed | SGDM HiFT | -100.0% | not known |" in page


def test_gradients_that_are_zeroed_early_are_not_there_in_the_forward_pass():
    row = {"forward": "100", "gradients": "30", "backward": "60", "update": "65"}
    assert with_early_zeroing(row) == 70
    assert with_early_zeroing({**row, "update": "90"}) == 90
