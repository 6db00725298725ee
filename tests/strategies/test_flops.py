"""A step's FLOPs, which do not depend on the machine."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from hift_lightning import HiFTStrategy
from tests.reference_loop import reference_loop, turns_of
from tests.small_transformer import SmallTransformer, loader, make_batches, trainer

DEPTH = 12
LAYERS = DEPTH + 2


def flops_of_fit(strategy):
    module = SmallTransformer(depth=DEPTH)
    with FlopCounterMode(display=False) as counter:
        trainer(strategy).fit(module, loader(make_batches(LAYERS)))
    return counter.get_total_flops()


def test_flops_of_a_cycle_equal_the_reference_loops_and_are_at_most_60_percent_of_full():
    strategy = HiFTStrategy()
    ours = flops_of_fit(strategy)
    reference = SmallTransformer(depth=DEPTH)
    with FlopCounterMode(display=False) as counter:
        reference_loop(
            reference,
            torch.optim.AdamW(reference.parameters()),
            [block.parameters for block in strategy.hift.plan.blocks],
            turns_of("top2down", LAYERS),
            make_batches(LAYERS),
        )
    assert ours == counter.get_total_flops()
    assert ours / flops_of_fit("auto") <= 0.60
