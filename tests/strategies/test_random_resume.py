"""Configurations and stopping points drawn at random: the resumed run equals one that never stopped."""

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hift_lightning.engine.errors import ConfigurationError
from tests.resuming import SCHEDULERS, Case, StopsAt, assert_goes_on, raise_stop, run
from tests.strategies.test_optimizers import OPTIMIZERS

ALWAYS, ON_DEMAND = 15, 120
HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_train_epoch_end",
)
ACTS = {
    "exception": raise_stop,
    "SIGINT": lambda trainer: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM": lambda trainer: os.kill(os.getpid(), signal.SIGTERM),
}


def drawn_case(draw: random.Random, folder: Path) -> Case:
    precision = draw.choice(["32-true", "32-true", "bf16-true", "16-true", "bf16-mixed"])
    masters = precision in ("bf16-true", "16-true") and draw.random() < 0.6
    optimizers = list(OPTIMIZERS)
    if precision in ("bf16-true", "16-true") and not masters:
        optimizers = ["SGD", "SGD with momentum"]  # others divide by what rounds to nothing, or take no 16-bit matrix
    strategy = {
        "order": draw.choice(["top2down", "bottom2up", "random"]),
        "seed": draw.randrange(9),
        "group_size": draw.randint(1, 4),
        "steps_per_block": draw.randint(1, 3),
        "lr_update": draw.choice(["cycle", "cycle", "cycle_once", "step"]),
        "update": draw.choice(["block", "streamed", "fused"]),
        "window": draw.choice(["16KiB", "256MiB"]),
        "offload": draw.choice(["cpu", "none", str(folder)]),
        "parked_dtype": draw.choice([None, None, "bfloat16"]),
        "activation_checkpointing": draw.random() < 0.2,
        "master_weights": masters,
    }
    fused = strategy["update"] == "fused"
    return Case(
        optimizer=draw.choice(optimizers),
        scheduler=draw.choice([*SCHEDULERS, "step", "step", "step"]),
        strategy=strategy,
        precision=precision,
        accumulate=1 if fused else draw.choice([1, 1, 2, 3]),
        val_check_interval=draw.choice([1.0, 2, 3]),
        clip=None if fused else draw.choice([None, 0.5]),
        epochs=3,
        batches=draw.randint(4, 7),
        workers=draw.choice([0, 0, 0, 0, 2]),
        by_steps=draw.random() < 0.5,
    )


def drawn_stop(draw: random.Random, case: Case, folder: Path) -> dict[str, Any]:
    """Arguments of `run` that make it stop, after it has saved at least once."""
    way = draw.choice(["max_steps", "kill", "exception", *ACTS])
    steps = draw.randint(1, case.steps - 2)
    if way == "max_steps":
        return {"max_steps": steps, "callbacks": [ModelCheckpoint(folder)]}
    hook = "on_train_batch_end" if way == "kill" else draw.choice(HOOKS)
    after = {"on_train_epoch_end": 1, "on_validation_batch_end": draw.randint(1, 3)}.get(hook, steps + 2)
    # every checkpoint as it is on disk when the run is killed, or one that the exception leaves
    saving = ModelCheckpoint(
        folder, save_on_exception=way != "kill", every_n_train_steps=draw.choice([1, 2]), save_top_k=-1
    )
    return {"callbacks": [StopsAt(hook, after, ACTS.get(way, raise_stop)), saving]}


def check(seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    while True:
        case = drawn_case(draw, folder)
        try:
            straight = run(case, folder)
            break
        except ConfigurationError:  # a window too small for the optimizer, say: draw again
            continue
    stopped, ckpt_path = [], None
    for number in range(draw.choice([1, 1, 2])):
        saved = folder / f"saved{number}"
        stop = drawn_stop(draw, case, saved)
        if number:
            stop.pop("max_steps", None)
        stopped.append(run(case, folder, ckpt_path=ckpt_path, **stop)[0])
        paths = sorted(saved.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        # where it ended before the stop, its last checkpoint has nothing left to do
        paths = [path for path in paths if torch.load(path, weights_only=True)["global_step"] < case.steps]
        if not paths:
            break
        ckpt_path = paths[-1]
    if ckpt_path is None:
        check(seed + 10_000, folder)
        return
    assert all(loss == loss for _, _, loss in straight[0].trace), dataclasses.asdict(case)
    assert_goes_on(straight, run(case, folder, ckpt_path=ckpt_path), *stopped)


@pytest.mark.parametrize("seed", range(ALWAYS))
def test_a_run_drawn_at_random_goes_on_exactly(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(ALWAYS, ALWAYS + ON_DEMAND))
def test_many_runs_drawn_at_random_go_on_exactly(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)
