"""Pinned memory in slabs: as much as is asked for and little more, each tensor apart from the others."""

import gc
import io

import pytest
import torch

from hift_lightning.engine.pinned import SMALLEST_SLAB, PinnedMemory
from tests import simulated_accelerator as sim

MIB = 2**20


def like(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_many_tensors_take_little_more_than_their_bytes(sim_device):
    # a layer of LLaMA-7B has four matrices of 4096 x 4096 and three of 11008 x 4096; here a sixteenth of the width
    shapes = [(256, 256)] * 4 + [(688, 256)] * 3 + [(256,)] * 2
    before = sim.pinned_memory_allocated()
    memory = PinnedMemory()
    tensors = [memory.empty(like(*shape), torch.float32) for _ in range(3 * 32) for shape in shapes]
    asked_for = sum(tensor.nbytes for tensor in tensors)
    assert asked_for > 200 * MIB
    assert asked_for <= sim.pinned_memory_allocated() - before <= 1.08 * asked_for
    one_by_one = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors)
    assert one_by_one > 1.3 * asked_for


def test_tensors_are_pinned_and_do_not_overlap(sim_device):
    memory = PinnedMemory()
    shapes = [(3,), (5, 7), (2 * SMALLEST_SLAB,), (1,), (), (300, 301), (64,)]
    tensors = [memory.empty(like(*shape), dtype) for shape in shapes for dtype in (torch.bfloat16, torch.float32)]
    for value, tensor in enumerate(tensors):
        assert tensor.is_pinned()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(value)
    for value, tensor in enumerate(tensors):
        assert tensor.eq(value).all()


def test_a_tensor_that_is_saved_is_saved_alone(sim_device):
    tensor = PinnedMemory().empty(like(1000), torch.float32).zero_()
    file = io.BytesIO()
    torch.save(tensor, file)
    assert len(file.getvalue()) < 6000


def test_strides_are_those_of_what_will_be_parked(sim_device):
    last = like(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensor = PinnedMemory().empty(last, torch.float32)
    assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_without_numbers_takes_nothing(sim_device):
    before = sim.pinned_memory_allocated()
    assert PinnedMemory().empty(like(0, 3), torch.float32).shape == (0, 3)
    assert sim.pinned_memory_allocated() == before


@pytest.mark.parametrize("first", ["memory", "tensor"])
def test_a_slab_is_freed_with_the_last_that_refers_to_it(sim_device, first):
    before = sim.pinned_memory_allocated()
    memory = PinnedMemory()
    there = {"memory": memory, "tensor": memory.empty(like(10), torch.float32)}
    del memory
    del there[first]
    gc.collect()
    assert sim.pinned_memory_allocated() == before + SMALLEST_SLAB
    del there
    gc.collect()
    assert sim.pinned_memory_allocated() == before
