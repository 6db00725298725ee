"""The experiment on optimizers: how they train, which runs are chosen, and that its page says what its record says."""

import pytest
import torch

from experiments.optimizers import grid
from experiments.optimizers.grid import BYTES, FINAL, HERE, RUNS, SEARCH, SEEDS, Run, recorded_in_quality
from experiments.optimizers.methods import CONTESTANTS, MOMENTUM, OPTIMIZERS
from experiments.optimizers.summary import accuracies, best, summary, unfinished
from experiments.quality.data_sets import DATA_SETS
from experiments.quality.methods import STEPS, rate_of
from experiments.quality.training import network_for

IN_TIME = CONTESTANTS["AdamW", "HiFT"].steps[-1]


def test_the_page_is_made_of_the_record():
    assert (HERE / "summary.md").read_text() == summary(SEARCH.load(), FINAL.load(), BYTES.load())


@pytest.fixture(scope="module")
def film_reviews():
    data = DATA_SETS["film reviews"].module("film_reviews", seed=0)
    data.setup("fit")
    return data


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_full_fine_tuning_moves_all_weights_and_hift_those_of_the_head_first(optimizer, film_reviews):
    batch = film_reviews.collate(film_reviews.train_dataloader().dataset[:2])
    moved = {}
    for way in ("full", "HiFT"):
        torch.manual_seed(0)
        network = network_for(film_reviews).train()
        contestant = CONTESTANTS[optimizer, way]
        training = contestant.method(network, rate_of(contestant.guess), STEPS, 0)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        training.step(batch)
        moved[way] = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved["HiFT"] == {name for name in before if name.startswith("head.")}
    assert moved["full"] >= moved["HiFT"] | {name for name in before if name.endswith("query.weight")}


def test_momentum_is_what_tells_sgdm_from_sgd():
    network = torch.nn.Linear(2, 2)
    assert OPTIMIZERS["SGDM"](network, 0.5).defaults["momentum"] == MOMENTUM
    assert OPTIMIZERS["SGD"](network, 0.5).defaults["momentum"] == 0


def test_runs_of_adamw_are_taken_from_the_record_of_the_experiment_on_quality():
    found = recorded_in_quality(RUNS["AdamW, full, rate 2^0, 200 steps, seed 0"])
    assert found is not None
    assert float(found["validation_accuracy"]) > 0.8
    assert "method" not in found
    assert recorded_in_quality(RUNS["SGD, full, rate 2^10, 200 steps, seed 0"]) is None


class Hill:
    """A table of runs of which those at a rate of 2^9 are the best."""

    def __init__(self):
        self.rows = {}

    def complete(self, chosen, again):
        for name in chosen:
            run = RUNS[name]
            values = {
                **{key: str(value) for key, value in run._asdict().items()},
                "validation_accuracy": str(1 - abs(run.exponent - 9) / 100),
                "validation_loss": "1",
                "test_accuracy": str(0.8 + run.seed / 100 + (run.way == "HiFT") / 100),
            }
            self.rows.setdefault(name, values)

    def load(self):
        return self.rows


def test_rates_are_searched_then_all_seeds_run_and_the_page_tells_what_is_missing(monkeypatch):
    search, final, peaks = Hill(), Hill(), Hill()
    peaks.complete = lambda chosen, again: None
    for name, table in {"SEARCH": search, "FINAL": final, "BYTES": peaks}.items():
        monkeypatch.setattr(grid, name, table)
    grid.complete(["SGDM", "SGD"], jobs=2)
    assert {(run.exponent, run.steps, run.seed) for run in map(RUNS.get, final.rows)} == {
        (9, steps, seed) for steps in (STEPS, IN_TIME) for seed in SEEDS
    }
    assert best(search.rows, "SGD", "full") == 9
    assert best(search.rows, "AdamW", "full") is None
    assert accuracies(final.rows, "SGD", "HiFT", IN_TIME) == pytest.approx([81 + seed for seed in range(1, 6)])
    missing = unfinished(search.rows, final.rows)
    assert not any(each.startswith(("SGDM", "SGD")) for each in missing)
    assert "AdamW, HiFT: its search and all after it" in missing
    del final.rows[Run("SGD", "HiFT", 9, STEPS, 2).name]
    assert set(unfinished(search.rows, final.rows)) == {"SGD, HiFT, 200 steps", *missing}
    page = summary(search.rows, final.rows, {})
    assert "| SGDM | 83.0 ± 0.7 | 84.0 ± 0.7 | 84.0 ± 0.7 | +1.0 ± 0.0 |" in page
    assert "| SGD | 83.0 ± 0.7 |  | 84.0 ± 0.7 | +1.0 ± 0.0 |" in page


@pytest.mark.slow
def test_a_run_done_again_is_that_of_the_record():
    name = "SGDM, full, rate 2^8, 200 steps, seed 0"
    again, recorded = grid.measure(name), SEARCH.load()[name]
    for column in ("validation_accuracy", "test_accuracy"):
        assert float(again[column]) == pytest.approx(float(recorded[column]), abs=0.003)
