"""Faults that a run meets while it trains."""

import functools
import os
import random
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from experiments.faults.privileges import obey_permissions
from experiments.faults.trials import CASE, Fault, Trial, begun, straight_run
from hift_lightning import HiFTStrategy
from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.residency import Residency
from tests.resuming import Case, StopsAt
from tests.small_transformer import SmallTransformer, loader, make_batches, trainer

Outcome = dict[str, object]
"""Times `tried`, times that it `ended` as it should, and times that something good was `lost`."""


def killed(name: int, tries: int, case: Case = CASE) -> Outcome:
    """Stop a run by a signal at random moments, from its first import to its end, and let it go on each time.

    Args:
        name: of the signal.
        tries: times that the signal has met a living run.
        case: of the runs.
    """
    draw = random.Random(int(name))
    tried = ended = lost = number = 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        straight = straight_run(Path(folder, "straight"), case)
        duration = time.monotonic() - started
        while tried < tries:
            number += 1
            trial = Trial(Path(folder, f"run{number}"), case)
            trial.folder.mkdir()
            while True:
                process = trial.start()
                process.join(draw.uniform(0.05, duration / 2) if tried < tries else None)
                if process.exitcode is None:
                    assert process.pid is not None
                    os.kill(process.pid, name)
                    process.join()
                if process.exitcode == 0:
                    break
                tried += 1
                outside = name == signal.SIGTERM and not trial.training.exists()  # nobody handles it
                dead = name == signal.SIGKILL or (outside and process.exitcode != 1)
                ended += process.exitcode == (-name if dead else 1)
                lost += not _whole(trial) or not trial.losses() <= straight.losses()
            lost += not trial.is_exact(straight)
    return {"tried": tried, "ended": ended, "lost": lost}


def met(
    fault: Callable[[random.Random], Fault],
    sentence: str,
    tries: int,
    fresh: bool = False,
    mend: Callable[[Trial], None] | None = None,
    case: Case = CASE,
) -> Outcome:
    """Let a run meet a fault at a random step, and go on without it.

    Args:
        fault: makes one.
        sentence: part of what the run has to end with, as a regular expression.
        tries: how often.
        fresh: whether the run begins with the fault, rather than at a checkpoint.
        mend: what somebody does before the run can go on.
        case: of the runs.
    """
    draw = random.Random(7)
    ended = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        straight = straight_run(Path(folder, "straight"), case)
        for number in range(tries):
            place = Path(folder, f"run{number}")
            if fresh:
                place.mkdir()
            trial = Trial(place, case) if fresh else begun(place, draw, case)
            failed = trial.complete(fault(draw)) == 1
            as_it_should = failed and re.search(sentence, trial.error) is not None
            ended += as_it_should
            if not as_it_should:
                print(f"another end: {trial.error or 'none'}", flush=True)
            lost += not _whole(trial)
            if mend is not None:
                mend(trial)
            trial.complete()
            lost += not trial.is_exact(straight)
    return {"tried": tries, "ended": ended, "lost": lost}


def _whole(trial: Trial) -> bool:
    """Whether there is no checkpoint that is not whole, nor a part of one under a checkpoint's name."""
    try:
        for path in trial.checkpoints.glob("*.ckpt"):
            StreamingCheckpointIO.check(path)
    except ConfigurationError:
        return False
    return True


# --- faults ----------------------------------------------------------------------------------------------------


def _a_step(draw: random.Random) -> int:
    return draw.randint(1, 5)


class _Spoils(Callback):
    """Makes the loss, or the gradients that come from it, NaN or inf."""

    def __init__(self, step: int, value: float) -> None:
        self._step, self._value, self._steps = step, value, 0

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._steps += 1
        if self._steps == self._step:
            loss.mul_(self._value)


def spoiled_loss(draw: random.Random) -> Fault:
    return functools.partial(_spoil, _a_step(draw), draw.choice([float("nan"), float("inf")]))


def _spoil(step: int, value: float, folder: Path) -> list[Callback]:
    return [_Spoils(step, value)]


def file_lost(draw: random.Random) -> Fault:
    return functools.partial(_damage, _a_step(draw), draw.random(), _remove)


def file_cut(draw: random.Random) -> Fault:
    return functools.partial(_damage, _a_step(draw), draw.random(), _cut)


def _damage(step: int, which: float, how: Callable[[Path], None], folder: Path) -> list[Callback]:
    def act(trainer: Any) -> None:
        files = sorted(folder.glob("hift-parked-*/*.bin"), key=lambda path: path.stat().st_size)
        large = files[len(files) // 2 :]
        for path in large[int(which * len(large)) :]:
            how(path)

    return [StopsAt("on_train_batch_start", step, act)]


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def disk_full(draw: random.Random) -> Fault:
    return functools.partial(_limit, _a_step(draw), draw.randint(1, 30_000))


def no_room_to_park(draw: random.Random) -> Fault:
    return functools.partial(_limit, 0, draw.randint(100, 2_000))


def _limit(step: int, nbytes: int, folder: Path) -> list[Callback]:
    def act(trainer: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails, as on a full disk, and does not kill
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    if step == 0:
        act(None)
    return [StopsAt("on_train_batch_start", step, act)]


def error_in_training(draw: random.Random) -> Fault:
    return functools.partial(_raise, _a_step(draw))


def _raise(step: int, folder: Path) -> list[Callback]:
    def act(trainer: Any) -> None:
        raise ZeroDivisionError("a broken sample")

    return [StopsAt("on_train_batch_start", step, act)]


class _Breaks(tuple[Any, ...]):
    """A sample that cannot be read any more when all of them together have been read so many times."""

    left = 0

    def __iter__(self) -> Any:
        _Breaks.left -= 1
        if _Breaks.left < 0:
            raise LookupError("a broken sample")
        return super().__iter__()


def sample_broken(draw: random.Random) -> Fault:
    return functools.partial(_break, draw.randrange(20))


def _break(reads: int, folder: Path) -> list[Callback]:
    def act(trainer: Any) -> None:
        _Breaks.left = reads
        rows = trainer.train_dataloader.dataset
        rows[:] = [_Breaks(row) for row in rows]

    return [StopsAt("on_train_start", 1, act)]


def read_only(draw: random.Random) -> Fault:
    return functools.partial(_protect, _a_step(draw))


def _protect(step: int, folder: Path) -> list[Callback]:
    def act(trainer: Any) -> None:
        obey_permissions()
        (folder / "checkpoints").chmod(0o500)

    return [StopsAt("on_train_batch_start", step, act)]


def unprotect(trial: Trial) -> None:
    trial.checkpoints.chmod(0o700)


def stopped_while_loading(draw: random.Random) -> Fault:
    return functools.partial(_stop_loading, draw.random() < 0.5)


def _stop_loading(after_state: bool, folder: Path) -> list[Callback]:
    """Press Ctrl-C before or after the optimizer's state is loaded, when neither masters nor position are."""
    load = Residency.load_state_dict

    def load_and_stop(*arguments: Any) -> None:
        if after_state:
            load(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    Residency.load_state_dict = load_and_stop  # type: ignore[assignment, method-assign]
    return []


_FOREIGN = "of-another-model.ckpt"


def another_model(draw: random.Random) -> Fault:
    depth = draw.choice([1, 3, 4, 5])  # that of the runs is 2
    return functools.partial(_put, depth, draw.choice(["hift", "auto"]))


def _put(depth: int, strategy: str, folder: Path) -> list[Callback]:
    """Train another model and save it as the newest checkpoint, so that it is the one to go on from."""
    other: Any = trainer(HiFTStrategy() if strategy == "hift" else strategy)  # type: ignore[no-untyped-call]
    module: Any = SmallTransformer(depth=depth)  # type: ignore[no-untyped-call]
    data, more = (loader(make_batches(count)) for count in (2, 1))  # type: ignore[no-untyped-call]
    other.fit(module, data, more)
    other.save_checkpoint(folder / "checkpoints" / _FOREIGN)
    return []


def take_away(trial: Trial) -> None:
    (trial.checkpoints / _FOREIGN).unlink()
