"""A registered order, tier and layout under the Trainer."""

import random

import pytest
import torch

from hift_lightning import HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.layers import Layer, register_layout
from hift_lightning.engine.rotation import register_order
from hift_lightning.engine.tiers import HostBuffer, Tier, register_tier
from tests.blocks_seen import BlocksSeen
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

STEPS = LAYERS + 2  # an epoch ends in the middle of a cycle


@pytest.fixture(autouse=True)
def registered(registries):
    @register_order("reshuffled")
    def reshuffled(blocks, cycle, seed):
        return random.Random(f"{seed} {cycle}").sample(range(blocks), blocks)


def fit(strategy, epochs=2, ckpt_path=None, **arguments):
    module = SmallTransformer()
    trainer_ = trainer(strategy, max_epochs=epochs, **arguments)
    trainer_.fit(module, loader(make_batches(STEPS)), ckpt_path=ckpt_path)
    return module, trainer_


def test_a_run_in_an_order_that_changes_is_resumed_exactly(tmp_path):
    _, stopped = fit(HiFTStrategy(order="reshuffled"), epochs=1)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    seen, straight_seen = BlocksSeen(), BlocksSeen()
    resumed, _ = fit(HiFTStrategy(order="reshuffled"), ckpt_path=tmp_path / "stopped.ckpt", callbacks=[seen])
    straight, _ = fit(HiFTStrategy(order="reshuffled"), callbacks=[straight_seen])
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))
    assert seen.steps == straight_seen.steps[STEPS:]
    assert straight_seen.steps[:LAYERS] != straight_seen.steps[LAYERS : 2 * LAYERS]


def test_another_seed_of_a_registered_order_is_another_plan(tmp_path):
    _, stopped = fit(HiFTStrategy(order="reshuffled", seed=1), epochs=1)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(ConfigurationError, match=r"\(order=reshuffled\), and this run has"):
        fit(HiFTStrategy(order="reshuffled", seed=2), ckpt_path=tmp_path / "stopped.ckpt")


def test_state_is_parked_in_a_registered_tier(any_device):
    made = []

    @register_tier("counted")
    class Counted(Tier):
        in_host_memory = True

        def allocate(self, like, dtype, device):
            made.append(HostBuffer(torch.empty_like(like, dtype=dtype, device="cpu")))
            return made[-1]

    module, trainer_ = fit(HiFTStrategy(offload="counted"), accelerator=any_device.type)
    expected, _ = fit(HiFTStrategy(), accelerator=any_device.type)
    assert_same(dict(module.state_dict()), dict(expected.state_dict()))
    if any_device.type != "cpu":  # where state is computed on where it is, and nothing is allocated
        kept = [t for s in trainer_.optimizers[0].state.values() for t in s.values() if t.dim()]
        assert {t.data_ptr() for t in kept} == {buffer.tensor.data_ptr() for buffer in made}


def test_a_registered_layout_decides_on_the_blocks():
    @register_layout("halves")
    def halves(model):
        names = [name for name, _ in model.named_parameters()]
        return [Layer("lower", names[:5]), Layer("upper", names[5:])]

    seen = BlocksSeen()
    _, trainer_ = fit(HiFTStrategy(), epochs=1, callbacks=[seen])
    assert [block.name for block in trainer_.strategy.hift.plan.blocks] == ["lower", "upper"]
    assert seen.steps[:2] == [frozenset({"head", "layers.0", "layers.1"}), frozenset({"embedding", "layers.0"})]
