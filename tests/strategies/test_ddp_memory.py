"""Bytes on the device of one of two ranks, counted by the simulated accelerator.

A single process stands for rank 0: torch's fake process group runs collectives as if the other rank had the same.
"""

import os

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hift_lightning import HiFTDDPStrategy, HiFTStrategy
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

CAP = 2**10
"""Bytes of a bucket; the largest tensor has twice as many."""


@pytest.fixture
def rank_0_of_2(monkeypatch):
    for name, value in {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("cpu:fake,sim:fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def peaks(device, strategy, **arguments):
    """The most bytes in a second cycle, and the most after backward without the weights."""
    after_backward = []

    class Noted(SmallTransformer):
        def on_before_optimizer_step(self, optimizer):
            after_backward.append(device.allocated() - device.bytes_of(self.parameters()))

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == LAYERS:  # in the first cycle the order of the gradients is not known
                device.reset_peak()

    module = Noted()
    trainer_ = trainer(strategy, accelerator=device.type, devices=1, use_distributed_sampler=False, **arguments)
    before = device.allocated()
    trainer_.fit(module, loader(make_batches(8, size=1)))
    return device.peak() - before, max(after_backward), trainer_.strategy.hift.plan


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_a_rank_needs_what_one_device_does_and_a_bucket(sim_device, rank_0_of_2, update):
    alone, after_backward, plan = peaks(sim_device, HiFTStrategy(update=update))
    ddp = HiFTDDPStrategy(update=update, bucket_cap_mb=CAP / 2**20)
    rank, rank_after_backward, _ = peaks(sim_device, ddp, num_nodes=2)
    largest = max(parameter.nbytes for parameter in SmallTransformer().parameters())
    # fused: the gradient that is on its way, beside the one that backward is at
    assert rank <= alone + (largest if update == "fused" else CAP)
    assert rank_after_backward <= after_backward + CAP
    model_bytes = 4 * plan.numel
    assert rank < 2 * model_bytes + alone - model_bytes  # a bucket of the model's size would not fit


def test_a_bucket_that_holds_the_block_costs_no_more_than_the_block(sim_device, rank_0_of_2):
    alone, _, plan = peaks(sim_device, HiFTStrategy())
    rank, _, _ = peaks(sim_device, HiFTDDPStrategy(), num_nodes=2)
    assert rank <= alone + 4 * plan.largest.numel
