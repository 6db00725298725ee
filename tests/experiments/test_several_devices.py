"""The page of `experiments/several_devices` says what its record says, and the record is complete."""

import pytest

from experiments.several_devices.plans import HERE, SETTINGS, TABLE, measure, summary


def test_the_page_is_made_of_the_record():
    rows = TABLE.load()
    assert list(rows) == list(SETTINGS)
    assert (HERE / "summary.md").read_text() == summary(rows)


@pytest.mark.slow
def test_a_row_planned_again_is_that_of_the_record():
    name = "llama3_8b on 8, hift_fsdp2"
    planned = {key: str(value) for key, value in measure(name).items()}
    assert {"name": name, **planned} == TABLE.load()[name]
