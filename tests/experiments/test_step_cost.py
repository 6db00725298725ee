"""The experiment on the cost of a step: what is counted and timed, and that its page says what its record says."""

import dataclasses

import pytest

from experiments.memory.task import Task
from experiments.step_cost.contestants import BLOCK, BY_HAND, CONTESTANTS, FULL, PLAIN, PUBLISHED
from experiments.step_cost.machine import MACHINE
from experiments.step_cost.measure import Cost, costs, gflop_of
from experiments.step_cost.phases import PHASES, SHARES, measure_phases
from experiments.step_cost.runs import BASE, DIMENSIONS, HERE, RUNS, SIZES, TIMES, Measured, Record, Run
from experiments.step_cost.summary import ratios, summary, unmeasured, varied
from tests import simulated_accelerator as sim
from tests.experiments.test_memory import TASK as TINY
from tests.experiments.test_memory import flop_of_a_step

OURS = [name for name in CONTESTANTS if name.startswith("HiFT")]


def test_the_page_is_made_of_the_record():
    assert (HERE / "summary.md").read_text() == summary(TIMES.load(), SHARES.load(), MACHINE.load())


def test_full_fine_tuning_has_the_flops_that_can_be_computed_by_hand():
    assert gflop_of(FULL, TINY) == pytest.approx(flop_of_a_step() / 1e9)


@pytest.mark.parametrize("contestant", [*OURS, BY_HAND, "rotation by hand, a tensor at a time"])
def test_all_rotations_have_the_flops_of_the_published_one(contestant):
    assert gflop_of(contestant, TINY) == gflop_of(PUBLISHED, TINY)


def test_flops_counted_again_are_those_of_the_record():
    measured = TIMES.load()[BASE]
    for contestant in (FULL, BY_HAND, BLOCK):
        assert gflop_of(contestant, measured.task) == pytest.approx(measured.costs[contestant].gflop, abs=1e-4)


def test_contestants_take_turns_and_each_cycle_is_timed():
    found = costs([FULL, PLAIN], TINY, cycles=2, threads=1)
    assert list(found) == [FULL, PLAIN]
    for name, cost in found.items():
        assert cost.gflop == gflop_of(name, TINY)
        assert len(cost.ms) == 2
        assert all(0 < ms < 10_000 for ms in cost.ms)


def test_a_contestant_that_cannot_train_is_named():
    with pytest.raises(RuntimeError, match="(?s)`full AdamW` does not train here: .*number of attention heads"):
        costs([FULL], dataclasses.replace(TINY, heads=3), cycles=1, threads=1)


def test_only_missing_runs_are_measured_and_all_are_kept(tmp_path):
    record = Record(tmp_path / "results.csv", {name: Run(TINY, (BY_HAND,), 1) for name in ("first", "second")})
    record.complete(["second"], threads=1, again=False)
    before = record.load()
    assert list(before) == ["second"]
    record.complete(["first", "second"], threads=1, again=False)
    after = record.load()
    assert list(after) == ["first", "second"]
    assert after["second"] == before["second"]
    assert after["first"].task == TINY
    assert after["first"].parameters == sum(p.numel() for p in TINY.model().parameters())
    longer = Record(record.path, {name: Run(TINY, (BY_HAND,), 2) for name in ("first", "second")})
    longer.complete(["first"], threads=1, again=False)
    assert longer.load() == after
    longer.complete(["first"], threads=1, again=True)
    assert [len(longer.load()[name].costs[BY_HAND].ms) for name in ("first", "second")] == [2, 1]


def invented(name):
    """Milliseconds of a contestant in two rounds, of which the second is on a machine half as fast."""
    number = list(CONTESTANTS).index(name)
    return Cost(1.0 + number, [100.0 + number, 200.0 + 2 * number])


def test_ratios_are_taken_within_a_round():
    measured = Measured(Task(), 2, 10**6, {name: invented(name) for name in CONTESTANTS})
    number = list(CONTESTANTS).index(BLOCK)
    assert ratios(measured.costs[BLOCK], measured.costs[FULL]) == pytest.approx([1 + number / 100] * 2)
    page = summary({"small": measured}, {}, {})
    assert f"HiFT's step takes {1 + number / 100:.3f} of full fine-tuning's, more than asked (at most 0.60)" in page
    tokens = Task().batch * Task().length
    assert f"| **{BLOCK}** | {1.5 * (100 + number):.1f} | {100 + number:.1f} to {200 + 2 * number:.1f} |" in page
    assert f"| {1000 * tokens / (1.5 * (100 + number)):,.0f} | {1 + number:.2f} |" in page


def test_what_is_missing_is_named():
    times = {
        name: Measured(run.task, 2, 1, {each: invented(each) for each in run.contestants}) for name, run in RUNS.items()
    }
    phases = {
        name: {**{f"{phase}_ms": "2" for phase in PHASES}, "threads": "2", "to_device_bytes": "1", "to_host_bytes": "2"}
        for name in SHARES.rows
    }
    assert "Not measured yet" not in summary(times, phases, {})
    for dimension, values in DIMENSIONS.items():
        assert list(varied(times, dimension)) == list(values)
    del times["width 384"]
    del phases["HiFT fused"]
    assert unmeasured(times, phases) == ["width 384", "HiFT fused"]
    assert "Not measured yet: width 384, HiFT fused." in summary(times, phases, {})


def test_sizes_grow():
    parameters = [sum(p.numel() for p in run.task.model().parameters()) for run in SIZES.values()]
    assert parameters == sorted(parameters)
    assert parameters[-1] > 2 * parameters[0]


@pytest.mark.skipif(sim.compiler_missing() is not None, reason=str(sim.compiler_missing()))
@pytest.mark.parametrize("way", SHARES.rows)
def test_phases_are_told_apart(way):
    row = measure_phases(way, TINY, cycles=1)
    assert row["steps"] == TINY.cycle
    spent = {phase: float(row[f"{phase}_ms"]) for phase in PHASES}
    copies = way != "full AdamW"
    for phase in ("forward", "backward", "update"):
        assert spent[phase] > 0
    for phase in ("page in", "park"):
        assert (spent[phase] > 0) == copies
    weights = 4 * sum(p.numel() for p in TINY.model().parameters())
    batch = 8 * TINY.batch * TINY.length
    # both moments of one block of four in each step, there and back
    assert row["to_device_bytes"] == batch + copies * 2 * weights // TINY.cycle
