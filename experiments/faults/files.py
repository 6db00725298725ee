"""Checkpoint files that are not what they were."""

import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.faults.runs import Outcome
from experiments.faults.trials import CASE, begun, same
from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.engine.errors import ConfigurationError
from tests.resuming import Case, newest

Files = Callable[[bytes, random.Random], Iterator[bytes]]


def read(files: Files, tries: int, case: Case = CASE) -> Outcome:
    """Load a checkpoint of a run after something has happened to it.

    Args:
        files: what it has become, again and again.
        tries: how often.
        case: of the run.
    """
    draw = random.Random(5)
    ended = lost = tried = 0
    with tempfile.TemporaryDirectory() as folder:
        path = newest(begun(Path(folder, "run"), draw, case).checkpoints)
        whole, io = path.read_bytes(), StreamingCheckpointIO()
        expected = torch.load(path, weights_only=True)
        for content, _ in zip(files(whole, draw), range(tries), strict=False):
            tried += 1
            path.write_bytes(content)
            try:
                same_content = same(io.load_checkpoint(path), expected)
            except ConfigurationError:
                ended += 1
            else:
                ended += same_content  # nothing that is read has changed
                lost += not same_content
    return {"tried": tried, "ended": ended, "lost": lost}


def cut_short(whole: bytes, draw: random.Random) -> Iterator[bytes]:
    while True:
        yield whole[: draw.randrange(len(whole))]


def bit_flipped(whole: bytes, draw: random.Random) -> Iterator[bytes]:
    while True:
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield bytes(content)


def foreign(whole: bytes, draw: random.Random) -> Iterator[bytes]:
    yield b""
    yield b"epoch,loss\n0,1.0\n"
    yield pickle.dumps({"state_dict": {}})
    yield draw.randbytes(len(whole))
    yield archive("notes.txt", b"text")
    yield archive("archive/data.pkl", pickle.dumps(_Runs()))


def archive(name: str, content: bytes) -> bytes:
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as records:
            records.writestr(name, content)
        file.seek(0)
        return file.read()


class _Runs:
    """Raises when it is unpickled, as anything could be done then."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the file has run')",)
