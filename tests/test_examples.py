"""The examples run, as their first lines say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(example):
    run = subprocess.run([sys.executable, str(example)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    if example.name == "plain_pytorch.py":
        losses = [float(line.split("loss")[1].split()[0]) for line in run.stdout.splitlines() if "loss" in line]
        assert losses[-1] < losses[0] / 4
        assert "300 updates, 3 to a cycle" in run.stdout
