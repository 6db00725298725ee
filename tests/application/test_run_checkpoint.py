"""The checkpoints of a run: the last of them is of its end."""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.application.running import TINY, run_application

QUIET = [*TINY, "logger=none", "evaluate=false", "objective=train/loss", "scheduler=constant"]
EVERY_5 = "callbacks.checkpoint.every_n_train_steps=5"


def steps_saved(folder: Path, *overrides: str) -> list[int]:
    run = run_application(folder, *QUIET, *overrides, "hydra.run.dir=here")
    assert run.returncode == 0, run.stderr
    return sorted(int(path.stem.removeprefix("step-")) for path in (folder / "here" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([EVERY_5], [8]),
        ([EVERY_5, "callbacks.checkpoint.save_top_k=-1"], [5, 8]),
        ([EVERY_5, "strategy=full"], [8]),
        (["callbacks.checkpoint.every_n_train_steps=4", "callbacks.checkpoint.save_top_k=-1"], [4, 8]),
        ([EVERY_5, "callbacks.checkpoint.save_on_train_epoch_end=false"], [5]),
    ],
)
def test_the_end_of_a_run_is_saved_too_and_once(tmp_path: Path, overrides: list[str], steps: list[int]) -> None:
    assert steps_saved(tmp_path, *overrides) == steps


def test_a_run_goes_on_from_its_end_as_from_the_end_of_a_pass(tmp_path: Path) -> None:
    weights = {}
    for name, every in (("pass", "callbacks.checkpoint.every_n_train_steps=null"), ("end", EVERY_5)):
        folder = tmp_path / name
        folder.mkdir()
        assert steps_saved(folder, every) == [8]
        on = run_application(
            folder, *QUIET, every, "trainer.max_epochs=2", "ckpt_path=here/checkpoints/step-8.ckpt", "hydra.run.dir=on"
        )
        assert on.returncode == 0, on.stderr
        assert json.loads((folder / "on" / "metrics.json").read_text())["steps"] == 16
        weights[name] = torch.load(folder / "on" / "checkpoints" / "step-16.ckpt", weights_only=True)["state_dict"]
    for name, weight in weights["pass"].items():
        assert torch.equal(weight, weights["end"][name]), name


@pytest.mark.parametrize("strategy", ["hift", "full"])
def test_a_run_that_max_steps_ended_within_a_pass_goes_on_in_it_and_its_log_is_kept(
    tmp_path: Path, strategy: str
) -> None:
    chosen = [f"strategy={strategy}", "logger=csv", "trainer.log_every_n_steps=1"]
    assert steps_saved(tmp_path, *chosen, "trainer.max_steps=5") == [5]
    overrides = [*QUIET, *chosen, "hydra.run.dir=here", "ckpt_path=here/checkpoints/step-5.ckpt"]
    on = run_application(tmp_path, *overrides)
    assert on.returncode == 0, on.stderr
    assert json.loads((tmp_path / "here" / "metrics.json").read_text())["steps"] == 8
    for log, steps in (("log-1", ["0", "1", "2", "3", "4"]), ("log", ["5", "6", "7"])):
        with (tmp_path / "here" / log / "metrics.csv").open() as file:
            logged = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
        assert logged == steps
    again = run_application(tmp_path, *overrides[:-1], "ckpt_path=here/checkpoints/step-8.ckpt")
    assert again.returncode == 0, again.stderr
    assert "Nothing was left to train: `ckpt_path=here/checkpoints/step-8.ckpt` is of step 8" in again.stderr


def test_what_a_monitor_never_saw_is_saved_at_the_end(tmp_path: Path) -> None:
    run = run_application(
        tmp_path, *TINY, "logger=none", "+callbacks.checkpoint.monitor=val/loss", "trainer.val_check_interval=1000",
        "trainer.check_val_every_n_epoch=null", "hydra.run.dir=here",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "`monitor=val/loss` was never measured" in run.stderr
    assert [path.name for path in (tmp_path / "here" / "checkpoints").iterdir()] == ["step-8.ckpt"]
