"""The faults that `experiments.faults` tries, each tried once; and that it would notice a loss."""

import dataclasses
import io
from pathlib import Path

import pytest
import torch

from experiments.faults import files, runs
from experiments.faults.summary import FAULTS, summary
from experiments.faults.trials import CASE
from tests.resuming import newest

SHORT = dataclasses.replace(CASE, epochs=2)


@pytest.mark.parametrize("name", FAULTS)
def test_it_ends_as_it_should_and_nothing_is_lost(name):
    assert FAULTS[name].measure(tries=1, case=SHORT) == {"tried": 1, "ended": 1, "lost": 0}


def checkpoint_changed(draw):
    return change_checkpoint


def change_checkpoint(folder: Path):
    """Another weight in the newest checkpoint, which is whole and loads."""
    path = newest(folder / "checkpoints")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["head.bias"][0] += 1
    torch.save(checkpoint, path)
    raise ZeroDivisionError


def part_left(draw):
    return leave_part


def leave_part(folder: Path):
    """Half of a checkpoint under a checkpoint's name, older than the newest."""
    whole = newest(folder / "checkpoints")
    content = whole.read_bytes()
    whole.with_name("part.ckpt").write_bytes(content[: len(content) // 2])
    whole.touch()
    raise ZeroDivisionError


def test_a_changed_checkpoint_is_noticed():
    outcome = runs.met(checkpoint_changed, "ZeroDivisionError", 1, case=SHORT)
    assert outcome == {"tried": 1, "ended": 1, "lost": 1}


def test_half_a_checkpoint_is_noticed():
    outcome = runs.met(part_left, "ZeroDivisionError", 1, case=SHORT)
    assert outcome == {"tried": 1, "ended": 1, "lost": 1}


def test_another_end_than_expected_is_noticed():
    outcome = runs.met(runs.error_in_training, "another error", 1, case=SHORT)
    assert outcome == {"tried": 1, "ended": 0, "lost": 0}


def another_value(whole, draw):
    checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
    checkpoint["state_dict"]["head.bias"][0] += 1
    changed = io.BytesIO()
    torch.save(checkpoint, changed)
    yield changed.getvalue()


def test_a_file_with_other_values_is_noticed():
    assert files.read(another_value, 1, case=SHORT) == {"tried": 1, "ended": 0, "lost": 1}


def test_the_page_adds_up_what_was_tried_and_lost():
    rows = {name: {"tried": "20", "ended": "20", "lost": str(int(name.startswith("disk")))} for name in FAULTS}
    assert f"Tried {20 * len(FAULTS)} times, lost 2 times." in summary(rows)
