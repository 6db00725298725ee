"""The strategy under the real Trainer equals the reference loop bit for bit."""

import itertools

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from hift_lightning import HiFTStrategy
from tests.reference_loop import reference_loop, turns_of
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "SGDM": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}
CYCLES = 3


def make_scheduler(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)


def assert_equal_runs(trained, losses, rates, reference, reference_losses, reference_rates):
    assert losses == reference_losses
    assert rates == reference_rates
    differences = {
        name: (weight - expected).abs().max().item()
        for (name, weight), expected in zip(trained.named_parameters(), reference.parameters(), strict=True)
    }
    assert max(differences.values()) == 0.0, differences


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", ["bottom2up", "top2down", "random"])
@pytest.mark.parametrize("group_size", [1, 2, LAYERS])
@pytest.mark.parametrize(
    ("accumulate", "clip_norm"), list(itertools.product([1, 3], [None, 0.5])), ids=lambda value: str(value)
)
def test_equals_the_reference_loop_exactly(optimizer, order, group_size, accumulate, clip_norm):
    blocks = -(-LAYERS // group_size)
    batches = make_batches(CYCLES * blocks * accumulate)
    strategy = HiFTStrategy(group_size=group_size, order=order, lr_update="cycle_once", seed=3)
    module = SmallTransformer(OPTIMIZERS[optimizer], make_scheduler)
    trainer(strategy, accumulate_grad_batches=accumulate, gradient_clip_val=clip_norm).fit(module, loader(batches))

    reference = SmallTransformer()
    reference_optimizer = OPTIMIZERS[optimizer](reference.parameters())
    names = [block.parameters for block in strategy.hift.plan.blocks]
    assert len(names) == blocks
    losses, rates = reference_loop(
        reference,
        reference_optimizer,
        names,
        turns_of(order, blocks, seed=3),
        batches,
        accumulate=accumulate,
        clip_norm=clip_norm,
        scheduler=make_scheduler(reference_optimizer),
    )
    assert len(set(rates)) == CYCLES  # the rate did change, once a cycle
    assert_equal_runs(module, module.losses, module.rates, reference, losses, rates)


def test_equals_the_reference_loop_with_value_clipping():
    batches = make_batches(2 * LAYERS)
    strategy = HiFTStrategy()
    module = SmallTransformer()
    trainer(strategy, gradient_clip_val=0.001, gradient_clip_algorithm="value").fit(module, loader(batches))

    reference = SmallTransformer()
    losses, rates = reference_loop(
        reference,
        reference.configure_optimizers(),
        [block.parameters for block in strategy.hift.plan.blocks],
        turns_of("top2down", LAYERS),
        batches,
        clip_value=0.001,
    )
    assert_equal_runs(module, module.losses, module.rates, reference, losses, rates)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lr_update", ["cycle", "cycle_once", "step"])
def test_one_block_equals_full_fine_tuning_exactly(optimizer, lr_update):
    batches = make_batches(8)
    module = SmallTransformer(OPTIMIZERS[optimizer], make_scheduler)
    trainer(HiFTStrategy(group_size=LAYERS, lr_update=lr_update), gradient_clip_val=0.5).fit(module, loader(batches))

    full = SmallTransformer(OPTIMIZERS[optimizer], make_scheduler)
    trainer(SingleDeviceStrategy("cpu"), gradient_clip_val=0.5).fit(full, loader(batches))

    assert_equal_runs(module, module.losses, module.rates, full, full.losses, full.rates)
