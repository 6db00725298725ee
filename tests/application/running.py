"""How the tests run the application: as a user does, in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

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


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def run_application(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*overrides), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


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
