"""The measuring code of `experiments.memory`, on a model whose bytes and FLOPs can be computed by hand."""

import pytest

from experiments.memory.methods import METHODS
from experiments.memory.task import Task
from hift_lightning.engine.partition import partition
from tests import simulated_accelerator as sim

pytestmark = pytest.mark.skipif(sim.compiler_missing() is not None, reason=str(sim.compiler_missing()))

TASK = Task(layers=2, width=64, intermediate=96, heads=2, vocabulary=48, batch=2, length=8)
WEIGHTS_OF_LAYER = 4 * 64 * 64 + 3 * 64 * 96
TOKENS, LOSS, NUMBER, BATCH = 2 * 8, 4, 4, 2 * 8 * 8
ROTARY = 2 * (64 // 2 // 2) * 4
"""Bytes of the model's only buffers."""


def flop_of_a_step():
    """Forward and twice as much in backward: 2 FLOP a token and weight, and attention's two products."""
    weights = 2 * WEIGHTS_OF_LAYER + 48 * 64
    attention = 2 * 2 * (2 * TOKENS * 8 * 64)
    return 3 * (2 * TOKENS * weights + attention)


def test_full_fine_tuning_takes_five_times_the_weights():
    run = METHODS["full AdamW"].run(TASK)
    assert run.weights == 4 * (2 * (WEIGHTS_OF_LAYER + 2 * 64) + 2 * 48 * 64 + 64)
    for step in run.steps[1:]:
        # weights, gradients, two moments and the optimizer's temporary of one value a weight, and a number that the
        # kernel is given to multiply with
        assert step.update == 5 * run.weights + BATCH + LOSS + ROTARY + NUMBER
        assert step.left == 2 * run.weights + LOSS
        assert step.to_device == step.to_host == 0
    assert run.flops == [flop_of_a_step()]


def test_a_rotation_moves_the_state_of_the_active_block_and_leaves_none():
    run = METHODS["block"].run(TASK)
    blocks = [4 * block.numel for block in reversed(partition(TASK.model()).blocks)]
    assert [step.left for step in run.steps] == [LOSS] * len(run.steps)
    assert [step.to_host for step in run.steps] == [2 * nbytes for nbytes in blocks] * 2
    assert [step.to_device for step in run.steps] == [0] * len(blocks) + [2 * nbytes for nbytes in blocks]
    assert len(run.flops) == len(blocks)
    assert max(run.flops) < flop_of_a_step()
