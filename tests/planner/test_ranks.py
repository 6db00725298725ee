"""A plan for one of several ranks, against what that rank does on the simulated accelerator."""

import os

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from hift_lightning import HiFTDDPStrategy, HiFTFSDP2Strategy, HiFTStrategy
from hift_lightning.engine.conversion import parameters_stay_themselves
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.planner import plan
from hift_lightning.planner.planning import StepPlanner
from hift_lightning.planner.ranks import PlannedRanks
from tests import simulated_accelerator as sim
from tests.planner.test_planned_bytes import Module, Peak, batch_of
from tests.small_transformer import SmallTransformer, make_batches

needs_compiler = pytest.mark.skipif(sim.compiler_missing() is not None, reason=str(sim.compiler_missing()))


@pytest.fixture
def rank_0_of_4(monkeypatch):
    """Two machines with two ranks each."""
    for name, value in {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setitem(os.environ, name, value)
    sim.load()
    dist.init_process_group("cpu:fake,sim:fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def counted_peak(strategy, blocks, precision, batch):
    module, before, peak = Module("llama"), sim.memory_allocated(), Peak(after=blocks)
    trainer = L.Trainer(
        accelerator="sim",
        devices=1,
        num_nodes=4,
        strategy=strategy,
        precision=precision,
        max_steps=2 * blocks,
        callbacks=[peak],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with parameters_stay_themselves(torch.device("sim")):
        module.to("sim")  # where FSDP2 would put it by `tensor.data = ...`, which this kind of device does not take
        trainer.fit(module, DataLoader([batch] * (2 * blocks), batch_size=None))
    return peak.bytes - before


CASES = {
    "hift_ddp": (HiFTDDPStrategy, {"bucket_cap_mb": 0.05}),
    "hift_ddp streamed": (HiFTDDPStrategy, {"update": "streamed", "window": "64KiB"}),
    "hift_ddp fused, most of it weights": (HiFTDDPStrategy, {"update": "fused", "window": "64KiB"}),
    "hift_fsdp2": (HiFTFSDP2Strategy, {}),
    "hift_fsdp2 streamed": (
        HiFTFSDP2Strategy, {"update": "streamed", "window": "64KiB", "activation_checkpointing": True}
    ),
    "hift_fsdp2 offloaded": (HiFTFSDP2Strategy, {"offload_params": True}),
    "hift_fsdp2 offloaded bf16": (
        HiFTFSDP2Strategy,
        {"offload_params": True, "master_weights": True, "update": "streamed", "activation_checkpointing": True},
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_of_a_rank_is_that_on_the_simulated_accelerator(case, request):
    kind, arguments = CASES[case]
    precision = "bf16-true" if "bf16" in case else "32-true"
    batch = batch_of("llama", (1, 4)) if "weights" in case else batch_of("llama")
    planned = plan(Module("llama"), kind(**arguments), batch, devices=2, num_nodes=2, precision=precision)
    request.getfixturevalue("rank_0_of_4")
    counted = counted_peak(kind(**arguments), len(planned.blocks), precision, batch)
    assert planned.peak_bytes == pytest.approx(counted, rel=0.001)


def test_a_rank_of_hift_ddp_sends_the_active_block_and_with_split_state_its_new_weights_too():
    module, batch = SmallTransformer(), make_batches(1)[0]
    for arguments, kinds in (({}, ("all-reduce",)), ({"shard_parked_state": True}, ("all-reduce", "broadcast"))):
        planned = plan(module, HiFTDDPStrategy(**arguments), batch, devices=2, num_nodes=2)
        for block in planned.blocks:
            nbytes = 4 * block.numel
            assert block.trace.collectives == dict.fromkeys(kinds, nbytes)
            assert block.sent_bytes(planned.ranks) == nbytes * (1.5 + ("broadcast" in kinds))


def test_split_state_is_parked_once_a_machine():
    module, batch = SmallTransformer(), make_batches(1)[0]
    whole = plan(module, HiFTDDPStrategy(), batch, devices=2).parked_bytes
    split = plan(module, HiFTDDPStrategy(shard_parked_state=True), batch, devices=2).parked_bytes
    assert whole / 2 <= split < 0.6 * whole  # tensors are dealt out whole


def test_a_rank_of_hift_fsdp2_reduces_the_active_block_and_gathers_what_is_above_it():
    depth, ranks = 4, 2
    module = SmallTransformer(depth=depth)
    planned = plan(module, HiFTFSDP2Strategy(), make_batches(1)[0], devices=ranks)

    def padded(parameters):
        return 4 * sum(-(-p.shape[0] // ranks) * ranks * p[0].numel() for p in parameters)

    layers = [padded(module.embedding.parameters()), *(padded(layer.parameters()) for layer in module.layers)]
    loose, head = padded(module.norm.parameters()), padded(module.head.parameters())
    # as `test_fsdp2` counts them on two ranks; an embedding's gradient does not depend on its weights
    for block, active in zip(planned.blocks, reversed(range(depth + 2)), strict=True):
        assert block.trace.collectives["reduce-scatter"] == [*layers, loose + head][active]
        in_backward = loose + head + sum(layers[max(active, 1) :])
        assert block.trace.collectives["all-gather"] == sum(layers) + loose + head + in_backward
    # Adam's moments and a count for each tensor, of this rank's rows
    counts = 4 * len(list(module.parameters()))
    assert planned.parked_bytes == 2 * (sum(layers) + loose + head) / ranks + counts


def test_weights_in_host_memory_come_to_the_device_for_each_gathering_and_gradients_go_back():
    planned = plan(SmallTransformer(), HiFTFSDP2Strategy(offload_params=True), make_batches(1)[0], devices=2)
    for block in planned.blocks:
        # collectives pad rows, and a few numbers go to the device beside the weights
        assert block.to_device_bytes == pytest.approx(block.trace.collectives["all-gather"] / 2, abs=256)
        assert block.to_host_bytes == pytest.approx(block.trace.collectives["reduce-scatter"] / 2, abs=256)


def test_so_they_do_on_one_device_where_nothing_is_gathered():
    module = SmallTransformer()
    planned = plan(module, HiFTFSDP2Strategy(offload_params=True), make_batches(1)[0], devices=1)
    weights = sum(p.nbytes for p in module.parameters())
    for block in planned.blocks:
        assert "all-gather" not in block.trace.collectives
        assert weights <= block.to_device_bytes < 2 * weights
        assert block.to_host_bytes == 4 * block.numel


def test_full_fine_tuning_of_several_ranks_sends_all_gradients():
    full = StepPlanner(SmallTransformer(), make_batches(1)[0], ranks=PlannedRanks(HiFTDDPStrategy(), devices=4)).plan(
        None
    )
    (block,) = full.blocks
    assert block.trace.collectives == {"all-reduce": 4 * full.numel}
    assert full.parked_bytes == 0


@pytest.mark.parametrize(
    ("strategy", "numbers", "message"),
    [
        (HiFTStrategy(), {"devices": 2}, "`devices=2` and `num_nodes=1` want a strategy of several devices"),
        (HiFTDDPStrategy(), {"devices": 0}, "`trainer.devices=0` cannot be planned"),
        (HiFTDDPStrategy(), {"devices": 2, "num_nodes": "auto"}, "`trainer.num_nodes=auto` cannot be planned"),
    ],
)
def test_ranks_that_cannot_be_planned_are_refused(strategy, numbers, message):
    with pytest.raises(ConfigurationError, match=message):
        plan(SmallTransformer(), strategy, make_batches(1)[0], **numbers)


def test_a_process_that_is_a_rank_is_refused(rank_0_of_4):
    with pytest.raises(ConfigurationError, match="by a process that is a rank already"):
        plan(SmallTransformer(), HiFTDDPStrategy(), make_batches(1)[0], devices=2)
