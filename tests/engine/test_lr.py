"""The counting stand-in for a scheduler."""

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.lr import DelayedLRScheduler


def make(lr_update="cycle", length=3):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    updates = [0]
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=12)
    delayed = DelayedLRScheduler(scheduler, lr_update, lambda: updates[0] // length, lambda: False, lambda: True)

    def update():
        updates[0] += 1
        delayed.step()
        return optimizer.param_groups[0]["lr"]

    return delayed, scheduler, update, updates


def test_cycle_passes_on_the_counted_steps_when_the_cycle_has_ended():
    _, _, update, _ = make()
    assert [update() for _ in range(6)] == pytest.approx([1, 1, 0.75, 0.75, 0.75, 0.5])


def test_cycle_once_passes_on_one():
    _, _, update, _ = make("cycle_once")
    assert [update() for _ in range(6)] == pytest.approx([1, 1, 11 / 12, 11 / 12, 11 / 12, 10 / 12])


def test_steps_that_were_no_updates_count_for_the_horizon():
    delayed, _, update, _ = make()
    delayed.step()  # a step that a GradScaler skipped: the cycle is one optimizer step longer
    assert [update() for _ in range(3)] == pytest.approx([1, 1, 8 / 12])


def test_resumes_in_the_middle_of_a_cycle():
    straight, _, update, _ = make()
    expected = [update() for _ in range(6)][4:]
    stopped, scheduler, update, updates = make()
    for _ in range(4):
        update()
    state, held, count = scheduler.state_dict(), stopped.held_steps, updates[0]
    resumed, _, update, updates = make()
    updates[0] = count
    resumed.load_state_dict(state)
    resumed.optimizer.param_groups[0]["lr"] = stopped.optimizer.param_groups[0]["lr"]  # as an optimizer's state does
    resumed.resume(held)
    assert [update() for _ in range(2)] == pytest.approx(expected)
    assert straight.held_steps == resumed.held_steps == 0


def test_it_passes_for_the_scheduler():
    delayed, scheduler, _, _ = make()
    assert isinstance(delayed, LinearLR)
    assert delayed.get_last_lr() == scheduler.get_last_lr()
    assert delayed.state_dict() == scheduler.state_dict()


def test_a_step_with_arguments_is_refused():
    delayed, *_ = make()
    with pytest.raises(ConfigurationError, match="`LinearLR.step` was called with arguments"):
        delayed.step(3)
