"""The 8-bit and 4-bit optimizers of torchao and bitsandbytes, where they are installed, under HiFT."""

import copy
import importlib

import lightning as L
import pytest
import torch
from torch import nn

from hift_lightning import HiFT, HiFTSettings, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.state_tensors import is_quantized, state_tensors
from tests.comparing import assert_same
from tests.reference_loop import reference_loop, turns_of
from tests.small_transformer import loader, trainer

OPTIMIZERS = [
    "torchao.optim.AdamW8bit",
    "torchao.optim.AdamW4bit",
    "torchao.optim.AdamWFp8",
    "bitsandbytes.optim.AdamW8bit",
]
WIDTH = 64  # smaller matrices have state of 32 bits
BLOCKS = 3


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    module, _, name = request.param.rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    # torchao compiles its steps; uncompiled ones need no compiler
    with torch.compiler.set_stance("force_eager"):
        yield lambda parameters: getattr(importlib.import_module(module), name)(parameters, lr=1e-2)


class Module(L.LightningModule):
    def __init__(self, make_optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)))
        self.make_optimizer = make_optimizer

    def loss(self, batch):
        return self.network(batch).tanh().square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def batches(count):
    return [torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def fit(make_optimizer, strategy, epochs=2, ckpt_path=None, **arguments):
    module = Module(make_optimizer)
    trainer_ = trainer(strategy, max_epochs=epochs, **arguments)
    trainer_.fit(module, loader(batches(BLOCKS + 1)), ckpt_path=ckpt_path)
    return module, trainer_


def states_of(module, trainer_):
    return [trainer_.optimizers[0].state[parameter] for parameter in module.parameters()]


@pytest.mark.parametrize("settings", [{}, {"update": "fused"}, {"offload": "files"}], ids=str)
def test_state_pages_as_it_is_and_training_equals_the_plain_loop(make_optimizer, settings, tmp_path):
    if "offload" in settings:
        settings = {"offload": tmp_path}
    module, trainer_ = fit(make_optimizer, HiFTStrategy(**settings))
    expected = Module(make_optimizer)
    optimizer = expected.configure_optimizers()
    blocks = [list(block.parameters) for block in trainer_.strategy.hift.plan.blocks]
    reference_loop(expected, optimizer, blocks, turns_of("top2down", BLOCKS), batches(BLOCKS + 1) * 2)
    assert_same(dict(module.state_dict()), dict(expected.state_dict()))
    matrix = trainer_.optimizers[0].state[module.network[0].weight]
    assert is_quantized(state_tensors(matrix))
    assert trainer_.strategy.report().blocks[0].parked_bytes < 4 * WIDTH * WIDTH


def test_a_resumed_run_equals_one_that_never_stopped(make_optimizer, tmp_path):
    _, stopped = fit(make_optimizer, "hift", epochs=1)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, resumed_trainer = fit(make_optimizer, "hift", ckpt_path=tmp_path / "stopped.ckpt")
    straight, straight_trainer = fit(make_optimizer, "hift")
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))
    for kept, other in zip(states_of(resumed, resumed_trainer), states_of(straight, straight_trainer), strict=True):
        assert kept.keys() == other.keys()
        assert_same(state_tensors(kept), state_tensors(other))


def test_a_device_holds_the_codes_of_one_block(make_optimizer, sim_device):
    def train(**settings):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))).to(sim_device.type)
        with HiFT(model, make_optimizer(model.parameters()), HiFTSettings(**settings)) as hift:
            for batch in batches(2 * BLOCKS):
                model(batch.to(sim_device.type)).tanh().square().mean().backward()
                hift.optimizer.step()
        return dict(model.state_dict()), hift.residency

    weights, residency = train()
    scalars = 4 * 2 * BLOCKS  # may stay in host memory
    # in the second of two cycles
    assert residency.parked_bytes - scalars <= residency.bytes_paged_in <= residency.parked_bytes
    assert_same(weights, train(update="streamed")[0])
    assert_same(weights, train(offload="none")[0])
    with pytest.raises(ConfigurationError, match="cannot be stepped on parts of a tensor"):
        train(update="streamed", window="2KiB")


@pytest.mark.parametrize("parked_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_state_of_another_dtype_than_its_weight_comes_back_in_it(weights, parked_dtype, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def start():
        model = Module(None).to(weights)
        optimizer = bitsandbytes.optim.AdamW32bit(model.parameters(), lr=1e-2)
        return model, HiFT(model, optimizer, HiFTSettings(parked_dtype=parked_dtype, offload=tmp_path))

    def train(model, hift, batches):
        with hift:
            for batch in batches:
                model.loss(batch.to(weights)).backward()
                hift.optimizer.step()

    straight, hift = start()
    train(straight, hift, batches(2 * BLOCKS + 1))
    model, hift = start()
    train(model, hift, batches(2 * BLOCKS + 1)[: BLOCKS + 1])
    saved = copy.deepcopy([hift.optimizer.state_dict(), hift.state_dict()])
    before = model
    model, hift = start()
    model.load_state_dict(before.state_dict())
    hift.load_optimizer_state_dict(saved[0], saved[1])
    hift.load_state_dict(saved[1])
    train(model, hift, batches(2 * BLOCKS + 1)[BLOCKS + 1 :])
    assert_same(model.state_dict(), straight.state_dict())
