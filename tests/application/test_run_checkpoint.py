"""The checkpoints of a run: the last of them is of its end."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from hift_lightning.export import export_run
from tests.application.running import TINY, run_application
from tests.comparing import assert_same

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


NO_DROPOUT = [
    "+model.network.config.hidden_dropout_prob=0.0",
    "+model.network.config.attention_probs_dropout_prob=0.0",
]


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
@pytest.mark.parametrize("strategy", ["hift", "full"])
def test_a_run_that_max_steps_ended_within_a_pass_goes_on_in_it_and_its_log_is_kept(
    tmp_path: Path, strategy: str, scheduler: str
) -> None:
    chosen = [
        *NO_DROPOUT, f"strategy={strategy}", f"scheduler={scheduler}", "logger=csv", "trainer.log_every_n_steps=1",
    ]  # fmt: skip
    if scheduler == "constant":
        assert steps_saved(tmp_path, *chosen, "trainer.max_steps=5") == [5]
    else:  # whose length is that of the whole run
        every = ["callbacks.checkpoint.every_n_train_steps=5", "callbacks.checkpoint.save_top_k=-1"]
        assert steps_saved(tmp_path, *chosen, *every) == [5, 8]
    overrides = [*QUIET, *chosen, "hydra.run.dir=here", "ckpt_path=here/checkpoints/step-5.ckpt"]
    on = run_application(tmp_path, *overrides)
    assert on.returncode == 0, on.stderr
    assert json.loads((tmp_path / "here" / "metrics.json").read_text())["steps"] == 8
    first = ["0", "1", "2", "3", "4"] if scheduler == "constant" else [str(step) for step in range(8)]
    for log, steps in (("metrics-1.csv", first), ("metrics.csv", ["5", "6", "7"])):
        with (tmp_path / "here" / "log" / log).open() as file:
            logged = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
        assert logged == steps
    whole = run_application(tmp_path, *QUIET, *chosen, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    newest = max((tmp_path / "here" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert_same(weights_in(newest), weights_in(tmp_path / "whole" / "checkpoints" / "step-8.ckpt"))


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return weights


def test_a_run_without_anything_left_to_train_says_so(tmp_path: Path) -> None:
    assert steps_saved(tmp_path) == [8]
    overrides = ["logger=none", "scheduler=constant", "hydra.run.dir=again", "ckpt_path=here/checkpoints/step-8.ckpt"]
    again = run_application(tmp_path, *TINY, *overrides)
    assert again.returncode == 0, again.stderr
    assert "Nothing was left to train: `ckpt_path=here/checkpoints/step-8.ckpt` is of step 8" in again.stderr


def test_where_a_monitor_has_saved_nothing_the_end_is_and_nothing_of_its_own_makes_room(tmp_path: Path) -> None:
    chosen = [
        *TINY, "logger=none", "hydra.run.dir=here", "scheduler=constant", "callbacks.checkpoint.monitor=val/loss",
        "callbacks.checkpoint.save_on_train_epoch_end=null", "trainer.check_val_every_n_epoch=null",
    ]  # fmt: skip
    run = run_application(tmp_path, *chosen, "trainer.val_check_interval=1000")
    assert run.returncode == 0, run.stderr
    assert "No checkpoint was saved by `monitor=val/loss` in the whole run" in run.stderr
    checkpoints = tmp_path / "here" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-8.ckpt"]
    shutil.rmtree(checkpoints)
    each_validation = "callbacks.checkpoint.save_on_train_epoch_end=false"
    run = run_application(tmp_path, *chosen, "trainer.val_check_interval=1000", each_validation)
    assert "No checkpoint was saved by `monitor=val/loss` in the whole run" in run.stderr
    assert [path.name for path in checkpoints.iterdir()] == ["step-8.ckpt"]
    shutil.rmtree(checkpoints)
    # the lowest is the first
    chosen += ["+callbacks.checkpoint.save_last=true", "callbacks.checkpoint.monitor=hift/cycle"]
    run = run_application(tmp_path, *chosen, "trainer.val_check_interval=4")
    assert run.returncode == 0, run.stderr
    best = {path.name for path in checkpoints.iterdir()}
    assert best == {"step-4.ckpt", "last.ckpt"}
    assert "The table is of the last weights, of step 8." in run.stdout
    assert "best:        here/checkpoints/step-4.ckpt (hift/cycle 0)" in run.stdout
    told = r"`last\.ckpt` is exported, and by `monitor=hift/cycle` the best checkpoint is `step-4\.ckpt`"
    with pytest.warns(UserWarning, match=told):
        export_run(tmp_path / "here", tmp_path / "out")
    on = run_application(
        tmp_path, *chosen, "trainer.val_check_interval=1000", "trainer.max_epochs=2",
        "ckpt_path=here/checkpoints/last.ckpt",
    )  # fmt: skip
    assert on.returncode == 0, on.stderr
    assert {path.name for path in checkpoints.iterdir()} == best
    assert "No checkpoint was saved by" not in on.stderr
