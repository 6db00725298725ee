"""How the tests run the application: as a user does, in a process of its own."""

import atexit
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock

from tests.processes import forking

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "conf"
# what the application shares with every other Hydra application
SHARED_CONFIGURATION = ROOT / "hydra_plugins" / "hift_lightning" / "conf"

# an encoder with random weights that trains in no time
TINY = [
    "model.pretrained=null",
    "model.network.config.num_hidden_layers=2",
    "model.network.config.hidden_size=32",
    "model.network.config.intermediate_size=64",
    "model.network.config.num_attention_heads=2",
    "trainer=quick",
    "trainer.accelerator=cpu",
]

# no question to a hub, which may or may not be reachable where the tests run
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
TIMEOUT = 300.0

# A start asks all processes for their exit codes, and two threads that read the same one take it from each other.
ONE_READS_EXIT_CODES = Lock()


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def run_application(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run_script(folder, "train.py", *overrides)


def run_script(
    folder: Path, script: str, *overrides: str, environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ...` in a new process; it finds imported already what takes longest to import."""
    context = forking()
    pipes = [context.Pipe(duplex=False) for _ in ("stdout", "stderr")]
    sending = [end for _, end in pipes]
    process = context.Process(target=_as_main, args=(folder, ROOT / script, overrides, dict(environment), sending))
    with ONE_READS_EXIT_CODES:
        process.start()
    for end in sending:
        end.close()
    with ThreadPoolExecutor(len(pipes)) as threads:
        told = [threads.submit(_read, receiving) for receiving, _ in pipes]
        timed_out = not wait([process.sentinel], TIMEOUT)
        with ONE_READS_EXIT_CODES:
            if timed_out:
                process.kill()
            process.join()
    out, err = (future.result() for future in told)
    if timed_out:
        raise subprocess.TimeoutExpired([script, *overrides], TIMEOUT, out, err)
    return subprocess.CompletedProcess([script, *overrides], process.exitcode, out, err)


def _read(pipe: Connection) -> str:
    with open(pipe.fileno(), closefd=False) as file:
        return file.read()


def _as_main(
    folder: Path, script: Path, overrides: Sequence[str], environment: Mapping[str, str], told: Sequence[Connection]
) -> None:
    for stream, pipe in zip((sys.stdout, sys.stderr), told, strict=True):
        os.dup2(pipe.fileno(), stream.fileno())
        pipe.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if path := environment.get("PYTHONPATH"):
        sys.path[:0] = path.split(os.pathsep)
    sys.argv = [str(script), *overrides]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing ends without


def start_application(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*overrides),
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell lets its background jobs ignore SIGINT, and their children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
