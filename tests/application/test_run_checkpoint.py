"""The checkpoints of a run: the last of them is of its end."""

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
