"""The application stopped by signals and resumed ends with the figure and the weights of a run that never stopped."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from hift_lightning.train import train
from tests.application.running import TINY, run_application, start_application
from tests.application.test_configuration import composed

BATCHES = 40
RUN = [
    *TINY, f"trainer.limit_train_batches={BATCHES}", "trainer.val_check_interval=1000", "logger=none",
    "trainer.max_epochs=2", "strategy.update=streamed",  # the encoder has dropout
    "+callbacks.checkpoint.save_last=true",
]  # fmt: skip
EVERY_STEP = "callbacks.checkpoint.every_n_train_steps=1"


def outcome(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures that do not depend on time or place, and the last checkpoint."""
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = {name: value for name, value in metrics.items() if name.startswith(("test/", "val/"))}
    return figures, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("straight")
    run = run_application(folder, *RUN, "hydra.run.dir=here")
    assert run.returncode == 0, run.stderr
    return outcome(folder / "here")


def stopped_by(number: int, folder: Path, *overrides: str) -> tuple[int, str, str]:
    """Start the application, send it a signal in the middle of an epoch, and return its exit code and both outputs."""
    process = start_application(folder, *RUN, *overrides, "hydra.run.dir=stopped")
    try:
        checkpoints = folder / "stopped" / "checkpoints"
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None and not list(checkpoints.glob("step-*.ckpt")):
            time.sleep(0.005)
        process.send_signal(number)
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, output, errors


def newest_complete(folder: Path) -> Path:
    def complete(path: Path) -> bool:
        try:
            return bool(torch.load(path, weights_only=True))
        except Exception:  # whatever a file says that was being written
            return False

    paths = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next(path for path in paths if complete(path))


def assert_goes_on(folder: Path, checkpoint: Path | str, straight: tuple[dict[str, float], dict[str, Any]]) -> None:
    done = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < done < 2 * BATCHES
    run = run_application(folder, *RUN, f"ckpt_path={checkpoint}", "hydra.run.dir=resumed")
    assert run.returncode == 0, run.stderr
    figures, saved = outcome(folder / "resumed")
    expected_figures, expected = straight
    assert {name: value for name, value in figures.items() if "before" not in name} == {
        name: value for name, value in expected_figures.items() if "before" not in name
    }
    assert saved["global_step"] == expected["global_step"] == 2 * BATCHES
    for name, weights in expected["state_dict"].items():
        assert torch.equal(saved["state_dict"][name], weights), name
    states, expected_states = saved["optimizer_states"][0]["state"], expected["optimizer_states"][0]["state"]
    for key, state in expected_states.items():
        for name, tensor in state.items():
            assert torch.equal(states[key][name], tensor), (key, name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_stopped_by_a_signal_it_names_the_checkpoint_and_goes_on_from_it_exactly(
    number: int, tmp_path: Path, straight: tuple[dict[str, float], dict[str, Any]]
) -> None:
    # a checkpoint a step tells that training has begun; the last one is of the step at which the signal came
    code, output, errors = stopped_by(number, tmp_path, EVERY_STEP)
    assert code == 1
    assert "Traceback" not in errors
    told = re.search(r"the last checkpoint is (\S+);", errors.strip().splitlines()[-1])
    assert told, errors
    # what was measured until then
    assert re.search(r"Blocks *\n.*\b3 +head ", output, re.S), output
    assert "pictures: stopped/memory_timeline.png, stopped/block_timeline.png" in output
    assert_goes_on(tmp_path, told.group(1), straight)


def test_killed_it_goes_on_exactly_from_the_newest_complete_checkpoint(
    tmp_path: Path, straight: tuple[dict[str, float], dict[str, Any]]
) -> None:
    code, _, _ = stopped_by(signal.SIGKILL, tmp_path, EVERY_STEP)
    assert code == -signal.SIGKILL
    assert_goes_on(tmp_path, newest_complete(tmp_path / "stopped" / "checkpoints"), straight)


class SendsSigterm(Callback):
    """Sends the process SIGTERM in a hook, and notes the work of the Trainer that has begun."""

    latest: "SendsSigterm"

    def __init__(self, job: str, hook: str, after_fit: bool) -> None:
        self.job, self.after_fit = job, after_fit
        self.jobs: list[str] = []
        setattr(self, hook, self._called)
        SendsSigterm.latest = self

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.jobs.append(stage)

    def _called(self, trainer: Any, *args: Any) -> None:
        if self.jobs[-1] == self.job and self.after_fit == ("fit" in self.jobs):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("job", "hook", "jobs"),
    [
        ("test", "on_test_batch_start", ["test"]),
        ("test", "on_test_epoch_end", ["test"]),
        ("fit", "on_train_end", ["test", "fit"]),
        ("validate", "on_validation_epoch_end", ["test", "fit", "validate"]),
        ("test", "on_test_epoch_end", ["test", "fit", "validate", "test"]),
    ],
)
def test_sigterm_is_obeyed_also_where_lightning_looks_no_more(
    job: str, hook: str, jobs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # seeding sets them, and the tests that come later shall not see it
    name = f"{__name__}.{SendsSigterm.__name__}"
    sends = [f"_target_: {name}", f"job: {job}", f"hook: {hook}", f"after_fit: {str('fit' in jobs).lower()}"]
    cfg = composed(
        *TINY, "logger=none", "callbacks.progress_bar=null", f"output_dir={tmp_path}",
        f"+callbacks.sends={{{', '.join(sends)}}}".replace(": ", ":"),
    )  # fmt: skip
    with pytest.raises(SystemExit) as end:
        train(cfg, [name])
    checkpoint = tmp_path / "checkpoints" / "step-8.ckpt"
    way_on = f"the last checkpoint is {checkpoint}; go on with `ckpt_path={checkpoint}`."
    assert end.value.code == f"Interrupted; {way_on if 'fit' in jobs else 'no checkpoint had been saved yet.'}"
    assert SendsSigterm.latest.jobs == jobs
    assert not (tmp_path / "metrics.json").exists()
