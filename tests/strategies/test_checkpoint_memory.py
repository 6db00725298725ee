"""Memory while saving and loading: RssAnon of a process, as the kernel counts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20


def measured(*arguments):
    run = subprocess.run(
        [sys.executable, "-m", "tests.strategies.checkpoint_memory", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


def place(offload, tmp_path):
    return tmp_path if offload == "files" else offload


@pytest.mark.parametrize("offload", ["cpu", "files"])
@pytest.mark.parametrize("mib", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_saving_takes_no_memory_and_loading_holds_parked_state_once(mib, offload, tmp_path):
    path = tmp_path / "saved.ckpt"
    slack = min(mib / 4, 64) * MIB
    saving = measured("save", mib, place(offload, tmp_path), path)
    assert mib * MIB <= saving["parked"] < (mib + 1) * MIB
    assert path.stat().st_size > 1.5 * mib * MIB
    assert saving["peak"] - saving["before"] < slack

    loading = measured("load", mib, place(offload, tmp_path), path)
    assert loading["parked"] == saving["parked"]
    in_memory = loading["parked"] if offload == "cpu" else 0
    assert loading["peak"] - loading["before"] < in_memory + slack
    assert loading["after"] - loading["before"] > in_memory - MIB
    print(f"{mib} MiB, {offload}: {saving} {loading}")


@pytest.mark.slow
def test_masters_too_are_held_once(tmp_path):
    path = tmp_path / "saved.ckpt"
    saving = measured("save", 64, "cpu", path, "masters")
    assert saving["parked"] >= 96 * MIB
    assert saving["peak"] - saving["before"] < 16 * MIB
    loading = measured("load", 64, "cpu", path, "masters")
    rounded = 16 * MIB  # the weights became bf16 meanwhile
    assert loading["parked"] == saving["parked"]
    assert loading["peak"] - loading["before"] < loading["parked"] + 16 * MIB
    assert loading["after"] - loading["before"] > loading["parked"] - rounded - MIB


@pytest.mark.slow
def test_these_measurements_see_what_a_checkpoint_io_that_buffers_takes(tmp_path):
    path = tmp_path / "saved.ckpt"
    saving = measured("save", 128, "cpu", path, "lightning")
    assert saving["peak"] - saving["before"] > path.stat().st_size
    loading = measured("load", 128, "cpu", path, "lightning")
    assert loading["peak"] - loading["before"] > 1.5 * loading["parked"]
