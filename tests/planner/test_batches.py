"""The largest batch that the plan names fits, and hardly a larger one does."""

import functools

import pytest
import torch

from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.planner import StepPlanner
from hift_lightning.planner.batches import BatchSizes
from hift_lightning.planner.gpus import GIB, needed_bytes
from tests.planner.small_llama import SmallLlama


@functools.cache
def planner(settings):
    module = SmallLlama(layers=3)
    return functools.cache(lambda batch: StepPlanner(module, torch.zeros(batch, 64, dtype=torch.long)).plan(settings))


@pytest.mark.parametrize("settings", [HiFTSettings(), None], ids=["hift", "full"])
@pytest.mark.parametrize("first", [1, 8])
def test_the_largest_batch_fits_and_one_that_is_two_percent_larger_does_not(settings, first):
    plan = planner(settings)
    sizes = BatchSizes(plan, {first: plan(first)}, 4 * GIB)
    for memory in (int(1.2 * GIB), 2 * GIB, 4 * GIB):
        batch = sizes.largest(memory)
        assert batch > 1
        assert needed_bytes(plan(batch).peak_bytes) <= memory
        assert needed_bytes(plan(int(batch * 1.02) + 1).peak_bytes) > memory


def test_no_batch_fits_where_one_row_does_not():
    plan = planner(HiFTSettings())
    sizes = BatchSizes(plan, {1: plan(1)}, 4 * GIB)
    assert sizes.largest(GIB) is None
    assert BatchSizes(plan, {4: plan(4)}, GIB).largest(GIB) is None
