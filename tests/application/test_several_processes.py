"""`train.py` in several processes: one output folder, one table, one exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.application.running import ENVIRONMENT, ROOT, TINY, run_application, start_application
from tests.processes import free_port

TWO = [*TINY, "trainer.devices=2"]


def run_under_slurm(folder: Path) -> None:
    """Start the two tasks of a job on this machine, with the variables that `srun` sets for each."""
    job = {
        "SLURM_JOB_ID": "15000", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), *TWO, "strategy=hift_ddp"]
    tasks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**ENVIRONMENT, **job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=300)
        assert task.returncode == 0, errors


def test_lightnings_launcher_torchrun_and_slurm_make_one_output_folder_and_the_same_weights(tmp_path: Path) -> None:
    folders = [tmp_path / "launched", tmp_path / "torchrun", tmp_path / "slurm"]
    for folder in folders:
        folder.mkdir()
    run = run_application(folders[0], *TWO, "strategy=hift_ddp")
    assert run.returncode == 0, run.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "train.py"), *TWO, "strategy=hift_ddp"]
    run = subprocess.run(command, cwd=folders[1], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("all numbers") == 1
    run_under_slurm(folders[2])
    saved = []
    for folder in folders:
        (outputs,) = folder.glob("outputs/*/*")
        assert [path.name for path in folder.iterdir()] == ["outputs"]
        metrics = json.loads((outputs / "metrics.json").read_text())
        assert metrics["hift/cycles"] == 2
        (checkpoint,) = (outputs / "checkpoints").iterdir()
        saved.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert all(torch.equal(first, other[name]) for other in saved[1:] for name, first in saved[0].items())


def test_a_sweep_that_would_start_itself_anew_is_refused(tmp_path: Path) -> None:
    run = run_application(tmp_path, "-m", *TWO, "strategy=hift_ddp", "strategy.group_size=1,2")
    assert run.returncode == 1
    assert "A sweep (`-m`) with `trainer.devices=2` cannot be" in run.stderr


def test_a_killed_rank_ends_the_job_and_its_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    steps = ["strategy=hift_ddp", "callbacks.checkpoint.every_n_train_steps=1", "evaluate=false", "hydra.run.dir=out"]
    endless = ["trainer.limit_train_batches=null", "trainer.max_epochs=100", "objective=train/loss"]
    process = start_application(tmp_path, *TWO, *steps, *endless)
    checkpoints = tmp_path / "out" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("*.ckpt")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (rank_1,) = [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(rank_1, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    newest = max(checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    done = torch.load(newest, weights_only=True)["global_step"]
    run = run_application(
        tmp_path, *TWO, *steps[:3], "objective=train/loss", f"ckpt_path={newest}", f"trainer.max_steps={done + 2}",
        "trainer.max_epochs=-1", "trainer.limit_train_batches=null", "hydra.run.dir=again",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["steps"] == done + 2
