"""The table and the picture of a sweep, from what its runs have left."""

import json
import os
import sys
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hift_lightning.sweep import SweepTable, read_runs, varied, written_metrics


def finished_run(folder: Path, number: int, overrides: list[str], accuracy: float | None) -> None:
    job = folder / str(number)
    (job / ".hydra").mkdir(parents=True)
    hydra = {"hydra": {"job": {"num": number}, "overrides": {"task": overrides}}}
    OmegaConf.save(OmegaConf.create(hydra), job / ".hydra" / "hydra.yaml")
    numbers = {"test/accuracy": accuracy, "memory/peak_device_bytes": number * 2**20}
    (job / "metrics.json").write_text(json.dumps(numbers))


def sweep_in(
    folder: Path,
    output_subdir: str | None = ".hydra",
    output_dir: str = "${hydra:runtime.output_dir}",
    chdir: bool = False,
) -> DictConfig:
    hydra = {"sweep": {"dir": str(folder)}, "output_subdir": output_subdir, "job": {"chdir": chdir}}
    return OmegaConf.create({"output_dir": output_dir, "hydra": hydra})


def test_runs_are_read_in_the_order_of_the_jobs_and_unfinished_ones_are_left_out(tmp_path: Path) -> None:
    finished_run(tmp_path, 10, ["+a=x=1", "seed=1"], 0.8)
    finished_run(tmp_path, 2, ["+a=y", "seed=1"], 0.7)
    (tmp_path / "3" / ".hydra").mkdir(parents=True)
    runs = read_runs(tmp_path, before={})
    assert [run["a"] for run in runs] == ["y", "x=1"]
    assert varied(runs) == ["a"]


def test_a_number_that_a_run_could_not_measure_is_left_out(tmp_path: Path) -> None:
    finished_run(tmp_path, 0, ["learning_rate=200"], None)
    assert "test/accuracy" not in read_runs(tmp_path, before={})[0]


def test_without_matplotlib_the_table_is_there_and_a_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    config = sweep_in(tmp_path)
    table = SweepTable("test/accuracy", "memory/peak_device_bytes")
    table.on_multirun_start(config)
    finished_run(tmp_path, 0, ["seed=1"], 0.8)
    finished_run(tmp_path, 1, ["seed=2"], 0.7)
    table.on_multirun_end(config)
    assert (tmp_path / "sweep.csv").exists()
    assert not (tmp_path / "sweep.png").exists()
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objective", "drawn"),
    [
        ("val/accuracy", "val/accuracy"),
        ("train/loss", "train/loss"),
        ("val/perplexity", "val/loss"),  # not measured
        ("memory/peak_device_bytes", "val/loss"),  # drawn to the right
        (None, "val/loss"),
    ],
)
def test_the_objective_is_drawn_upwards_where_it_was_measured(
    objective: str | None, drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upwards: list[str] = []
    monkeypatch.setattr("hift_lightning.sweep.draw", lambda runs, names, vertical, *rest: upwards.append(vertical))
    table = SweepTable(["test/f1", "val/loss", "test/accuracy"], "memory/peak_device_bytes")
    config = sweep_in(tmp_path)
    table.on_multirun_start(config)
    finished_run(tmp_path, 0, ["seed=1"], 0.8)
    numbers = json.loads((tmp_path / "0" / "metrics.json").read_text())
    numbers |= {"val/accuracy": 0.7, "val/loss": 0.5, "train/loss": 0.4}
    (tmp_path / "0" / "metrics.json").write_text(json.dumps(numbers))
    of_job = OmegaConf.create({"objective": objective, "hydra": {"overrides": {"task": ["seed=1"]}}})
    of_job.hydra.mode = RunMode.MULTIRUN
    table.on_job_end(of_job, JobReturn(status=JobStatus.COMPLETED))
    table.on_multirun_end(config)
    assert upwards == [drawn]


def test_runs_of_an_earlier_sweep_are_left_out(tmp_path: Path) -> None:
    for number in range(3):
        finished_run(tmp_path, number, [f"seed={number}"], 0.8)
    before = written_metrics(tmp_path)
    os.utime(tmp_path / "1" / "metrics.json", (100, 100))  # written again, by whatever clock
    finished_run(tmp_path, 3, ["seed=3"], 0.7)
    assert [run["seed"] for run in read_runs(tmp_path, before)] == ["1", "3"]


def test_metrics_that_a_run_has_written_elsewhere_are_read_too(tmp_path: Path) -> None:
    finished_run(tmp_path, 0, ["seed=0", "output_dir=deeper"], 0.8)
    (tmp_path / "0" / "deeper").mkdir()
    (tmp_path / "0" / "metrics.json").rename(tmp_path / "0" / "deeper" / "metrics.json")
    finished_run(tmp_path, 1, ["seed=1"], 0.7)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "metrics.json").write_text("{}")  # of no run
    assert [run["seed"] for run in read_runs(tmp_path, before={})] == ["0", "1"]


def test_a_sweep_that_leaves_no_overrides_is_refused(tmp_path: Path) -> None:
    config = sweep_in(tmp_path, output_subdir=None)
    with pytest.raises(SystemExit, match="`hydra.output_subdir=null` leaves out"):
        SweepTable("test/accuracy", "memory/peak_device_bytes").on_multirun_start(config)


def test_one_folder_for_all_runs_of_a_sweep_is_refused(tmp_path: Path) -> None:
    table = SweepTable("test/accuracy", "memory/peak_device_bytes")
    for config in (sweep_in(tmp_path, output_dir="here"), sweep_in(tmp_path, output_dir="/here", chdir=True)):
        with pytest.raises(SystemExit, match="is one folder for all runs of a sweep.*`hydra.sweep.dir`"):
            table.on_multirun_start(config)
    for config in (sweep_in(tmp_path, output_dir="here/${seed}"), sweep_in(tmp_path, output_dir="here", chdir=True)):
        table.on_multirun_start(config)


def test_the_one_run_that_has_ended_well_is_told_with_what_the_failed_one_differed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = SweepTable(["test/accuracy"], "memory/peak_device_bytes")
    config = sweep_in(tmp_path)
    table.on_multirun_start(config)
    finished_run(tmp_path, 0, ["strategy.group_size=2", "seed=1"], 0.8)
    of_job = OmegaConf.create(
        {"hydra": {"mode": "MULTIRUN", "overrides": {"task": ["strategy.group_size=99", "seed=1"]}}}
    )
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ValueError("no")
    of_job.hydra.mode = RunMode.MULTIRUN
    table.on_job_end(of_job, failed)
    table.on_multirun_end(config)
    told = capsys.readouterr().out
    assert "group_size" in told
    assert "│ 2 " in told
    assert "seed" not in told
