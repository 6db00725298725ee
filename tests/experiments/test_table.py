"""The record of an experiment: rows are measured once, and again only where that is asked for."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

from experiments.parked_dtype.runs import RUNS, summary
from experiments.table import Table


def process_of(name):
    return {"process": os.getpid()}


def test_only_missing_rows_are_measured_each_by_a_process_of_its_own(tmp_path):
    table = Table(tmp_path / "record.csv", ("first", "second", "third"), process_of)
    table.complete(["first", "third"], again=False)
    before = table.load()
    assert list(before) == ["first", "third"]
    table.complete(table.rows, again=False)
    after = table.load()
    assert list(after) == ["first", "second", "third"]
    assert {name: after[name] for name in before} == before
    table.complete(["second"], again=True)
    assert table.load()["second"] != after["second"]
    assert len({row["process"] for row in after.values()} | {str(os.getpid())}) == 4


def killed(name):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_row_whose_process_is_killed_says_so_where_that_is_foreseen(tmp_path):
    foreseen = Table(tmp_path / "record.csv", ("row",), killed, if_killed={"outcome": "killed"})
    foreseen.complete(["row"], again=False)
    assert foreseen.load() == {"row": {"name": "row", "outcome": "killed"}}
    with pytest.raises(BrokenProcessPool):
        Table(tmp_path / "other.csv", ("row",), killed).complete(["row"], again=False)


def test_the_page_on_parked_dtype_compares_the_runs_of_each_seed():
    rows = {
        name: {
            "steps": "7",
            "hift/cycles": "1",
            "test/accuracy_before": "0.25",
            "test/accuracy": str(0.5 + 0.01 * (run.seed - 42) - 0.002 * (run.dtype == "bf16")),
            "test/loss": str(0.25 + 0.125 * (run.dtype == "bf16")),
            "memory/parked_bytes": "1000" if run.dtype == "fp32" else "501",
        }
        for name, run in RUNS.items()
        if run.setting == "default" or run.seed == 42  # the other setting is not complete yet
    }
    text = summary(rows)
    assert "- default: with bf16, 0.5010 of the bytes" in text
    assert "50.80% against 51.00%" in text
    assert "by -0.20 to -0.20 points, and the test loss by +0.1250 to +0.1250" in text
    assert "2.00 points apart" in text
    assert "- one block" not in text
    assert "after 256 visits of its block, at 0.25 of" in text
