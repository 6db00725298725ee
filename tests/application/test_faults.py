"""Faults in the middle of a run of the application: one sentence, a code that is not 0, and nothing good is lost."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.application.running import ENVIRONMENT, TINY, run_script

MODULE = '''
import os, resource
from pathlib import Path
import lightning as L
from hift_lightning.data import SentenceDataModule


class Breaks(L.Callback):
    """Does something before the batch that comes after so many steps."""

    def __init__(self, folder, what, after):
        self.folder, self.what, self.after = Path(folder), what, after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.after:
            return
        if self.what == "fill disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
            return
        files = list(self.folder.rglob("*.bin"))
        assert files
        for file in files:
            file.unlink() if self.what == "delete" else os.truncate(file, 4)


class FailingData(SentenceDataModule):
    """Its third batch cannot be read."""

    def train_dataloader(self):
        for i, batch in enumerate(super().train_dataloader()):
            if i == 3:
                raise LookupError("a broken record")
            yield batch
'''

OFTEN = ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.checkpoint.save_on_train_epoch_end=false"]


def breaks(what: str, after: int) -> list[str]:
    return [
        "strategy.offload=parked",
        "+callbacks.breaks._target_=faults.Breaks",
        "+callbacks.breaks.folder=parked",
        f"+callbacks.breaks.what={what}",
        f"+callbacks.breaks.after={after}",
        "trusted_targets=[faults.Breaks]",
        *OFTEN,
    ]


RUNS = {
    "nan": ["learning_rate=1e30"],
    "nan skipped": ["learning_rate=1e30", "strategy.nonfinite=skip"],
    "delete": breaks("delete", 5),
    "shorten": breaks("shorten", 5),
    "fill disk": breaks("'fill disk'", 3),
    "data": ["data._target_=faults.FailingData", "trusted_targets=[faults.FailingData]", *OFTEN[1:]],
    "no folder for a run": ["hydra.run.dir=file/here"],
    "no folder for a sweep": ["-m", "hydra.sweep.dir=/proc/here"],
    "no output folder": ["output_dir=/proc/here"],
    "no folder for checkpoints": ["callbacks.checkpoint.dirpath=file/here"],
    "no folder for pictures": ["callbacks.monitor.folder=file/here"],
}


def run_in(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run_script(folder, "train.py", *overrides, environment={**ENVIRONMENT, "PYTHONPATH": str(folder)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    def run(name: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        folder = tmp_path_factory.mktemp("run")
        (folder / "faults.py").write_text(MODULE)
        (folder / "parked").mkdir()
        (folder / "file").write_text("where a folder should be")
        shared = [*TINY, "logger=none", "evaluate=false", "objective=train/loss"]
        options = [option for option in RUNS[name] if option == "-m"]
        rest = [option for option in RUNS[name] if option != "-m"]
        if not any(option.startswith("hydra.") for option in rest):
            rest.append("hydra.run.dir=here")
        return folder, run_in(folder, *options, *shared, *rest)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS), strict=True))


Runs = dict[str, tuple[Path, subprocess.CompletedProcess[str]]]


def sentence(run: subprocess.CompletedProcess[str]) -> str:
    """The last line, of a run that has failed without a traceback."""
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    return run.stderr.strip().splitlines()[-1]


def checkpoint_in(told: str) -> Path:
    match = re.search(r"[Tt]he last checkpoint is (\S+); go on with `ckpt_path=(\S+)`\.", told)
    assert match, told
    assert match.group(1) == match.group(2)
    return Path(match.group(1))


def test_nan_ends_with_step_block_and_checkpoint(runs: Runs) -> None:
    folder, run = runs["nan"]
    told = sentence(run)
    assert re.match(
        r"The loss has NaN in update \d \(block \d, `network\.\S+`\); weights and optimizer state are as", told
    )
    assert "`nonfinite='skip'`" in told
    step = int(re.search(r"update (\d)", told)[1]) - 1  # type: ignore[index]
    saved = torch.load(checkpoint_in(told), weights_only=True)
    assert saved["global_step"] == saved["hift"]["engines"][0]["updates"] == step
    assert all(weights.isfinite().all() for weights in saved["state_dict"].values())


def test_steps_with_nan_that_are_left_out_are_counted_in_the_numbers_and_told_once(runs: Runs) -> None:
    folder, run = runs["nan skipped"]
    assert run.returncode == 0, run.stderr
    metrics = json.loads((folder / "here" / "metrics.json").read_text())
    assert 0 < metrics["hift/skipped_steps"] < metrics["steps"] == 8
    assert run.stderr.count("A step is left out") == 1
    assert re.search(r"steps left out for NaN or inf\W+" + str(metrics["hift/skipped_steps"]), run.stdout)


@pytest.mark.parametrize(
    ("fault", "message", "last_step"),
    [
        ("delete", r"a file of parked state is gone: .*hift-parked-.*\.bin", 4),
        ("shorten", r"a file of parked state is too short: .*hift-parked-.*\.bin", 4),
        ("fill disk", r"no room for [\d,]+ bytes of parked state: .*the weights of network\.\S+.* have changed", 2),
    ],
)
def test_lost_parked_state_ends_with_the_file_and_the_last_checkpoint(
    fault: str, message: str, last_step: int, runs: Runs
) -> None:
    folder, run = runs[fault]
    told = sentence(run)
    assert re.search(message, told), told
    checkpoint = checkpoint_in(told)
    assert checkpoint.name == f"step-{last_step}.ckpt"
    assert "No checkpoint is saved of where the run has ended" in run.stderr
    assert torch.load(checkpoint, weights_only=True)["hift"]["engines"][0]["updates"] == last_step


def test_a_run_goes_on_from_the_checkpoint_that_is_named(runs: Runs) -> None:
    folder, run = runs["shorten"]
    checkpoint = checkpoint_in(sentence(run))
    again = run_in(
        folder, *TINY, "logger=none", "evaluate=false", "objective=train/loss", "strategy.offload=parked",
        f"ckpt_path={checkpoint}", "hydra.run.dir=again",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "again" / "metrics.json").read_text())["steps"] == 8


def test_a_data_loader_that_raises_keeps_its_traceback_and_the_run_is_saved_and_named(runs: Runs) -> None:
    folder, run = runs["data"]
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "LookupError: a broken record" in run.stderr
    saved = torch.load(checkpoint_in(run.stderr), weights_only=True)
    assert saved["global_step"] == saved["hift"]["engines"][0]["updates"] == 3


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("no folder for a run", r"`hydra\.run\.dir=file/here` cannot be written to \(Not a directory\)"),
        ("no folder for a sweep", r"`hydra\.sweep\.dir=/proc/here` cannot be written to"),
        ("no output folder", r"`output_dir=/proc/here` cannot be written to"),
        ("no folder for pictures", r"`callbacks\.monitor\.folder=\S*file/here` cannot be written to"),
        ("no folder for checkpoints", r"`callbacks\.checkpoint\.dirpath=\S*file/here` cannot be written to"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_told_before_the_model_is_built(
    fault: str, named: str, runs: Runs
) -> None:
    _, run = runs[fault]
    assert re.match(named, sentence(run))
    assert "HiFT:" not in run.stderr + run.stdout
