"""The experiment on quality: how runs are chosen, compared and told."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from experiments.quality import cost, grid
from experiments.quality.comparison import (
    accuracies,
    chosen_exponents,
    less,
    losses,
    mean,
    missing_in_steps,
    missing_in_time,
    over_data_sets,
)
from experiments.quality.cost import BYTES, bytes_row, one_more, times
from experiments.quality.data_sets import DATA_SETS
from experiments.quality.grid import DATA, FINAL, HERE, RUN_OFF_SEEDS, SEARCH, SEEDS, Run, seeds_of
from experiments.quality.methods import (
    CONTESTANTS,
    FULL,
    FULL_NO_DROPOUT,
    HIFT,
    IN_LESS,
    IN_MEMORY,
    LONG,
    LORA_NO_DROPOUT,
    LORAS_STEPS,
    MOST_TEXTS,
    ONE_TURN,
    ONE_TURN_NO_DROPOUT,
    OTHERS_OF_ALL_WEIGHTS,
    PLANNED_SEEDS,
    STEPS,
    TOP,
    TOP_IN_LORAS_TIME,
    TOP_NO_DROPOUT,
    TWO_IN_LORAS_TIME,
    adamw_with,
    equal_steps,
    equal_time,
    hift,
    loras_steps,
    loss_of,
    rate_of,
)
from experiments.quality.pair_times import IN_LORAS_TIME, steps_in_loras_time
from experiments.quality.pair_times import TABLE as PAIRS
from experiments.quality.summary import added_seeds, summary
from experiments.quality.training import describe, network_for
from experiments.quality.variants import TABLE as VARIANTS
from hift_lightning import HiFT, HiFTSettings
from tests.application.test_configuration import composed


def rows_of(value_by_method, steps_of, data_set="mails", column="test_accuracy"):
    runs = [
        (Run(data_set, method, 0, steps_of(method), seed), value)
        for method, by_seed in value_by_method.items()
        for seed, value in zip(seeds_of(method), by_seed, strict=False)
    ]
    return {run.name: {**{k: str(v) for k, v in run._asdict().items()}, column: str(value)} for run, value in runs}


def test_the_page_is_made_of_the_record():
    data, search, final, variants, pairs, peaks = (t.load() for t in (DATA, SEARCH, FINAL, VARIANTS, PAIRS, BYTES))
    assert (HERE / "summary.md").read_text() == summary(data, search, final, variants, times(), pairs, peaks)


def test_the_record_describes_the_data_that_are_read():
    told = {key: str(value) for key, value in describe("film reviews").items()}
    assert {"name": "film reviews", **told} == DATA.load()["film reviews"]


def test_differences_are_paired_by_seed_and_their_error_is_that_of_the_mean():
    rows = rows_of({"full AdamW": [0.80, 0.82, 0.84, 0.86, 0.88], "HiFT": [0.81, 0.83, 0.85, 0.87, 0.89]}, equal_time)
    found = accuracies(rows, equal_time)
    gain = less(found, "HiFT", "full AdamW", ["mails"])
    assert gain.mean == pytest.approx(1)
    assert gain.error == pytest.approx(0, abs=1e-9)
    own = over_data_sets(found, "HiFT", ["mails"])
    assert own.mean == pytest.approx(85)
    assert own.error == pytest.approx(torch.tensor([81.0, 83, 85, 87, 89]).std().item() / 5**0.5)
    assert str(mean([1, 2, 3])) == "2.0 ± 0.6"


def test_of_two_methods_the_seeds_that_both_have_are_compared():
    more = CONTESTANTS[TOP_IN_LORAS_TIME].seeds - 5
    assert more > 0
    rows = rows_of({FULL: [0.80] * 5, TOP_IN_LORAS_TIME: [0.81] * 5 + [0.97] * more}, equal_time)
    found = accuracies(rows, equal_time)
    assert less(found, TOP_IN_LORAS_TIME, FULL, ["mails"]).mean == pytest.approx(1)
    assert over_data_sets(found, TOP_IN_LORAS_TIME, ["mails"]).mean == pytest.approx(81 + 16 * more / (5 + more))
    assert not accuracies(rows_of({TOP_IN_LORAS_TIME: [0.81] * (4 + more)}, equal_time), equal_time)


def test_planned_seeds_and_those_that_were_added_are_told_apart():
    seeds = CONTESTANTS[TWO_IN_LORAS_TIME].seeds
    assert seeds == CONTESTANTS[LORA_NO_DROPOUT].seeds > PLANNED_SEEDS
    assert len({*SEEDS, *RUN_OFF_SEEDS}) == seeds + len(RUN_OFF_SEEDS)
    rows = rows_of(
        {LORA_NO_DROPOUT: [0.80] * seeds, TWO_IN_LORAS_TIME: [0.81] * PLANNED_SEEDS + [0.83] * (seeds - PLANNED_SEEDS)},
        equal_time,
    )
    found = accuracies(rows, equal_time)
    (told,) = added_seeds(found, found, TWO_IN_LORAS_TIME, LORA_NO_DROPOUT)
    assert "the planned ones show +1.0 ± 0.0 points" in told
    assert "the added ones +3.0 ± 0.0 points" in told


def test_losses_are_hundredths_of_those_on_the_test_part():
    rows = rows_of({"full AdamW": [0.5] * 5, "HiFT": [0.375] * 5}, equal_time, column="test_loss")
    found = losses(rows, equal_time)
    assert str(over_data_sets(found, "HiFT", ["mails"])) == "37.5 ± 0.0"
    assert less(found, "HiFT", "full AdamW", ["mails"]).signed() == "-12.5 ± 0.0"


def test_methods_without_all_seeds_are_not_compared_but_named():
    rows = rows_of({"full AdamW": [0.8] * 5, "HiFT": [0.8] * 4}, equal_time)
    assert accuracies(rows, equal_time).keys() == {("mails", "full AdamW")}
    assert accuracies(rows, equal_steps).keys() == {("mails", "full AdamW")}  # its steps are those of both
    names = missing_in_time({}, rows)
    assert names["mails"] == ["HiFT (begun)", *(name for name in CONTESTANTS if name not in ("full AdamW", "HiFT"))]
    assert all(names[name] == list(CONTESTANTS) for name in DATA_SETS if name != "mails")
    rows = rows_of({"full AdamW": [0.8] * 5, "HiFT": [0.8] * 5}, equal_time)
    assert missing_in_steps(rows) == {name: ["HiFT"] if name == "mails" else [] for name in DATA_SETS}


class Hill:
    """A table of runs whose validation accuracy is highest at an exponent; of two alike the lower loss wins."""

    def __init__(self, top):
        self.top, self.rows = top, {}

    def complete(self, chosen, again):
        for name in chosen:
            exponent = grid.RUNS[name].exponent
            values = {"validation_accuracy": f"{1 - abs(exponent - self.top)}", "validation_loss": str(-exponent)}
            self.rows.setdefault(name, values)

    def load(self):
        return self.rows


@pytest.mark.parametrize(("top", "chosen", "tried"), [(2, 2, 3), (5, 5, 6), (-1.5, -1, 6)])
def test_the_search_climbs_until_both_neighbours_of_the_best_rate_are_known(monkeypatch, top, chosen, tried):
    hill = Hill(top)
    monkeypatch.setattr(grid, "SEARCH", hill)
    assert CONTESTANTS["HiFT"].guess == 2
    assert grid.best_exponent("mails", "HiFT") == chosen
    assert len(hill.rows) == tried
    assert all(grid.RUNS[name].steps == CONTESTANTS["HiFT"].steps_in_time for name in hill.rows)


class Noisy(Hill):
    """A table of runs whose accuracy is given by exponent and seed."""

    def __init__(self, accuracy):
        super().__init__(0)
        self.accuracy = accuracy

    def complete(self, chosen, again):
        for name in chosen:
            run = grid.RUNS[name]
            values = {"validation_accuracy": str(self.accuracy[run.exponent][run.seed]), "validation_loss": "1"}
            self.rows.setdefault(name, values)


@pytest.mark.parametrize("seeds", [6, 5])
def test_rates_that_one_seed_cannot_tell_apart_have_a_run_off_where_methods_are_compared_closely(monkeypatch, seeds):
    first, *others = RUN_OFF_SEEDS
    far = 0.93  # the standard error of the best, 0.97 on 934 mails, is 0.0056
    accuracy = {
        2: {first: far},
        3: {first: 0.97, **dict.fromkeys(others, 0.95)},
        4: {first: 0.965, **dict.fromkeys(others, 0.96)},
        5: {first: far},
    }
    table = Noisy(accuracy)
    monkeypatch.setattr(grid, "SEARCH", table)
    contestant = dataclasses.replace(CONTESTANTS[LORA_NO_DROPOUT], seeds=seeds)
    monkeypatch.setitem(CONTESTANTS, LORA_NO_DROPOUT, contestant)
    assert grid.best_exponent("mails", LORA_NO_DROPOUT) == (4 if seeds > 5 else 3)
    assert len(table.rows) == (7 if seeds > 5 else 3)


def test_final_runs_have_the_seeds_of_their_method_and_those_in_equal_time_come_first(monkeypatch):
    asked = []
    monkeypatch.setattr(grid, "SEARCH", Hill(2))
    monkeypatch.setattr(grid, "FINAL", SimpleNamespace(complete=lambda names, again, jobs: asked.append(names)))
    grid.complete(["mails"], [FULL, IN_MEMORY, TOP_IN_LORAS_TIME], again=False, jobs=2)
    assert len(grid.SEARCH.rows) == 5 + 4 + 3  # from 0 up to 2, from 3 down to it, and at it from the start
    runs = [[grid.RUNS[name] for name in names] for names in asked]
    told = [sorted((run.method, run.exponent, run.steps, run.seed) for run in part) for part in runs]
    lora, close = ((name, 2, CONTESTANTS[name].steps_in_time) for name in (IN_MEMORY, TOP_IN_LORAS_TIME))
    assert told[0] == sorted(
        (*each, seed)
        for each, seeds in (((FULL, 2, STEPS), SEEDS[:5]), (lora, SEEDS[:5]), (close, SEEDS[:8]))
        for seed in seeds
    )
    assert told[1] == [(TOP_IN_LORAS_TIME, 2, STEPS, seed) for seed in SEEDS[:8]]
    assert told[2] == []


def test_runs_in_loras_steps_come_last(monkeypatch):
    asked = []
    monkeypatch.setattr(grid, "SEARCH", Hill(2))
    monkeypatch.setattr(grid, "FINAL", SimpleNamespace(complete=lambda names, again, jobs: asked.append(names)))
    grid.complete(["mails"], [TWO_IN_LORAS_TIME, LORA_NO_DROPOUT], again=False, jobs=2)
    runs = [{(run.method, run.steps, run.seed) for run in map(grid.RUNS.get, names)} for names in asked]
    in_time = ((name, CONTESTANTS[name].steps_in_time) for name in (TWO_IN_LORAS_TIME, LORA_NO_DROPOUT))
    assert runs[0] == {(*each, seed) for each in in_time for seed in SEEDS[:16]}
    assert runs[1:] == [set(), {(TWO_IN_LORAS_TIME, LORAS_STEPS, seed) for seed in SEEDS[:16]}]


def test_final_runs_have_the_rate_that_the_search_has_chosen(monkeypatch):
    class Kept:
        rows = SEARCH.load()

        def complete(self, chosen, again):
            assert self.rows.keys() >= set(chosen)

        def load(self):
            return self.rows

    monkeypatch.setattr(grid, "SEARCH", Kept())
    chosen: dict[tuple[str, str], set[int]] = {}
    for row in FINAL.load().values():
        chosen.setdefault((row["data_set"], row["method"]), set()).add(int(row["exponent"]))
    assert chosen == {pair: {grid.best_exponent(*pair)} for pair in chosen}


@pytest.fixture(scope="module")
def film_reviews():
    data = DATA_SETS["film reviews"].module("film_reviews", seed=0)
    data.setup("fit")
    return data


TRAINS = {
    "full AdamW": ("embeddings", "encoder", "head"),
    "HiFT": ("head",),
    "HiFT bottom2up": ("embeddings",),
    "HiFT, 20 steps a block, no momentum": ("head",),
    ONE_TURN: ("encoder", "head"),
    TOP: ("encoder", "head"),
    FULL_NO_DROPOUT: ("embeddings", "encoder", "head"),
    ONE_TURN_NO_DROPOUT: ("encoder", "head"),
    TOP_NO_DROPOUT: ("encoder", "head"),
    TOP_IN_LORAS_TIME: ("encoder", "head"),
    TWO_IN_LORAS_TIME: ("encoder", "head"),
    LORA_NO_DROPOUT: ("encoder", "head"),
    "LoRA": ("encoder", "head"),
    "BitFit": ("embeddings", "encoder", "head"),
    "head only": ("head",),
    "MeZO": ("embeddings", "encoder", "head"),
}


@pytest.mark.parametrize("method", TRAINS)
def test_a_method_trains_what_it_should_in_its_first_step(method, film_reviews):
    torch.manual_seed(0)
    network = network_for(film_reviews).train()
    training = CONTESTANTS[method].method(network, rate_of(0), STEPS, 0)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    batch = film_reviews.collate(film_reviews.train_dataloader().dataset[:2])
    assert 0 < training.step(batch) < 10
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    where = {"embeddings": "body.embeddings.", "encoder": "body.encoder.", "head": "head."}
    assert {part for part, prefix in where.items() if any(name.startswith(prefix) for name in changed)} == set(
        TRAINS[method]
    )


def test_one_turn_streamed_makes_the_updates_of_whole_blocks(film_reviews):
    """Its final runs are from before it was streamed."""
    batch = film_reviews.collate(film_reviews.train_dataloader().dataset[:2])
    whole = hift(adamw_with(beta1=0.0), steps_per_block="once", lr_update="step", always_active=["head.*"])
    trained = []
    for method in (CONTESTANTS[ONE_TURN].method, whole):
        torch.manual_seed(0)
        network = network_for(film_reviews)  # without dropout
        begun = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        training = method(network, rate_of(2), 14, 0)
        for _ in range(14):  # two of each block
            training.step(batch)
        assert not any(torch.equal(parameter, begun[name]) for name, parameter in network.named_parameters())
        trained.append({name: parameter.detach() for name, parameter in network.named_parameters()})
    assert all(torch.equal(parameter, trained[1][name]) for name, parameter in trained[0].items())


LAYER = "body.encoder.layer.{}."
EMBEDDINGS = "body.embeddings."


@pytest.mark.parametrize(
    ("method", "always", "blocks"),
    [
        (TOP, (5,), [*((LAYER.format(n),) for n in (5, 4, 3, 2, 1, 0)), (EMBEDDINGS,)]),
        (
            TWO_IN_LORAS_TIME,
            (5, 4),
            [
                (LAYER.format(5),),
                *((LAYER.format(n), LAYER.format(n - 1)) for n in (4, 2)),
                (LAYER.format(0), EMBEDDINGS),
            ],
        ),
    ],
)
def test_feed_forward_parts_of_the_top_are_trained_in_the_turns_of_all_blocks(film_reviews, method, always, blocks):
    batch = film_reviews.collate(film_reviews.train_dataloader().dataset[:2])
    network = network_for(film_reviews)
    training = CONTESTANTS[method].method(network, rate_of(2), len(blocks), 0)
    always = ("head.", *(LAYER.format(n) + part for n in always for part in ("intermediate.", "output.")))
    for block in blocks:
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        training.step(batch)
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, before[name]) != name.startswith((*block, *always)), name


def test_the_preset_of_the_application_is_the_recipe_with_two_layers_a_block(film_reviews):
    cfg = composed("experiment=long_turns_minilm")
    network = network_for(film_reviews)
    training = CONTESTANTS[TWO_IN_LORAS_TIME].method(network, cfg.learning_rate, 340, cfg.strategy.seed)
    engine = training.finish.__self__
    training.finish()
    (rate_and_betas,) = {(group["initial_lr"], group["betas"]) for group in engine.optimizer.param_groups}
    assert rate_and_betas == (cfg.optimizer.lr, tuple(cfg.optimizer.betas))
    assert cfg.optimizer.lr == rate_of(chosen_exponents(FINAL.load())["film reviews", TWO_IN_LORAS_TIME])
    assert cfg.model.network.dropout == 0
    module = torch.nn.Module()
    module.network = network
    names = [field.name for field in dataclasses.fields(HiFTSettings) if field.name in cfg.strategy]
    settings = HiFTSettings(**{name: cfg.strategy[name] for name in names})
    in_application = HiFT(module, engine.optimizer, settings, total_steps=340).plan
    for ours, theirs in zip(engine.plan.parts, in_application.parts, strict=True):
        assert [f"network.{name}" for name in ours.own_parameters] == list(theirs.own_parameters)
    same = ("steps_per_block", "lr_update", "update", "window", "order", "group_size")
    assert {name: getattr(settings, name) for name in same} == {name: getattr(engine.settings, name) for name in same}


@pytest.mark.parametrize(
    "method", [FULL_NO_DROPOUT, ONE_TURN_NO_DROPOUT, TOP_NO_DROPOUT, TWO_IN_LORAS_TIME, LORA_NO_DROPOUT]
)
def test_without_dropout_a_batch_has_one_loss(method, film_reviews):
    network = network_for(film_reviews).train()
    CONTESTANTS[method].method(network, rate_of(0), STEPS, 0)
    batch = film_reviews.collate(film_reviews.train_dataloader().dataset[:2])
    assert loss_of(network, batch) == loss_of(network, batch)
    with_dropout = network_for(film_reviews).train()
    assert loss_of(with_dropout, batch) != loss_of(with_dropout, batch)


@pytest.mark.parametrize(("lora", "method"), MOST_TEXTS.items())
def test_lora_in_as_much_memory_has_the_largest_batch_whose_peak_is_not_above_it(lora, method):
    peak = {name: int(row["peak_bytes"]) for name, row in BYTES.load().items()}
    assert peak[bytes_row(lora)] <= peak[bytes_row(method)] < peak[one_more(lora)]


@pytest.mark.parametrize(
    ("method", "other", "least"),
    [
        (ONE_TURN, FULL, -1),
        *((method, other, 0) for method in (LONG, ONE_TURN) for other in OTHERS_OF_ALL_WEIGHTS),
        *((other, HIFT, 0) for other in OTHERS_OF_ALL_WEIGHTS),
        (TOP_NO_DROPOUT, FULL, 0),
        (TOP_NO_DROPOUT, FULL_NO_DROPOUT, -1),
        (TOP_NO_DROPOUT, IN_LESS, 0),
        (TOP_IN_LORAS_TIME, FULL, 0),
        (TOP_IN_LORAS_TIME, FULL_NO_DROPOUT, -1),
        (TWO_IN_LORAS_TIME, FULL, 0),
        (TWO_IN_LORAS_TIME, FULL_NO_DROPOUT, 0),
        (TWO_IN_LORAS_TIME, IN_LESS, 0),
        (TWO_IN_LORAS_TIME, LORA_NO_DROPOUT, -1),
    ],
)
def test_the_record_shows_what_is_claimed_of_the_mean_accuracy_over_all_data_sets(method, other, least):
    lead = less(accuracies(FINAL.load(), equal_time), method, other, DATA_SETS)
    assert lead.mean - 2 * lead.error > least


def test_the_record_shows_a_lead_over_lora_in_equal_peak_memory_and_equal_steps():
    lead = less(accuracies(FINAL.load(), loras_steps), TWO_IN_LORAS_TIME, LORA_NO_DROPOUT, DATA_SETS)
    assert lead.mean - 2 * lead.error > 0


@pytest.mark.parametrize(
    ("method", "other"),
    [
        (ONE_TURN, IN_LESS),
        (TOP_NO_DROPOUT, FULL),
        (TOP_NO_DROPOUT, LORA_NO_DROPOUT),
        (TOP_IN_LORAS_TIME, LORA_NO_DROPOUT),
        (TWO_IN_LORAS_TIME, LORA_NO_DROPOUT),
        (TWO_IN_LORAS_TIME, FULL_NO_DROPOUT),
        (TWO_IN_LORAS_TIME, IN_LESS),
    ],
)
def test_the_record_shows_what_is_claimed_of_the_mean_loss_over_all_data_sets(method, other):
    more = less(losses(FINAL.load(), equal_time), method, other, DATA_SETS)
    assert more.mean + 2 * more.error < 0


def test_a_second_call_of_the_cost_has_nothing_to_time(monkeypatch):
    """Where all is in the record; what is missing is timed with the methods asked for alone."""
    monkeypatch.setattr(cost, "BYTES", SimpleNamespace(complete=lambda rows, again: None, rows=()))
    timed = []
    monkeypatch.setattr(cost, "measure_times", lambda rounds, chosen: timed.append(chosen) or {})
    monkeypatch.setattr(cost, "write_rows", lambda path, rows: None)
    monkeypatch.setattr("sys.argv", ["cost"])
    cost.main()
    assert timed == []
    monkeypatch.setattr("sys.argv", ["cost", "--again", "--only", "MeZO"])
    cost.main()
    assert timed == [["MeZO"]]


def test_every_method_has_the_time_of_full_fine_tuning():
    """Or about as much of it as its FLOPs allow, if they allow less."""
    for name, row in times().items():
        steps = CONTESTANTS[name].steps_in_time
        time, flops = (steps * float(row[share]) / STEPS for share in ("time_of_full", "flops_of_full"))
        assert time <= 1, name
        assert time > 0.9 or 0.95 < flops < 1.01, name


@pytest.mark.parametrize("method", IN_LORAS_TIME)
def test_hift_in_loras_time_has_no_more_steps_than_take_as_long(method):
    allowed = steps_in_loras_time(PAIRS.load(), method)
    assert allowed - 10 <= CONTESTANTS[method].steps_in_time <= allowed


def test_steps_in_loras_time_are_by_the_mean_ratio_over_data_sets():
    ratios = {("tweets", TOP_IN_LORAS_TIME): 1.0, ("mails", TOP_IN_LORAS_TIME): 1.5, ("mails", TWO_IN_LORAS_TIME): 9.0}
    rows = {str(key): {"data_set": key[0], "method": key[1], "ratio": str(ratio)} for key, ratio in ratios.items()}
    assert steps_in_loras_time(rows, TOP_IN_LORAS_TIME) == CONTESTANTS[LORA_NO_DROPOUT].steps_in_time / 1.25
