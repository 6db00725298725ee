"""What is left of a step that was not completed, and what an optimizer's own arguments come to."""

from typing import Any

import pytest
import torch
from torch import nn

from hift_lightning.engine.errors import NonfiniteError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.settings import HiFTSettings


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


class Failing(torch.optim.Adam):
    fails = False

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if self.fails:
            raise RuntimeError("after the update")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float32) -> None:
    model(torch.ones(1, 4, dtype=dtype)).sum().backward()
    optimizer.step()


def test_arguments_behind_the_closure_reach_the_optimizer() -> None:
    seen = []

    class Scaling(torch.optim.SGD):
        def step(self, closure: Any = None, scale: float = 1.0, *, power: int = 1) -> None:
            seen.append((scale, power))
            super().step(closure)

    model = two_layers()
    optimizer = Scaling(model.parameters())
    with HiFT(model, optimizer):
        optimizer.step(lambda: model(torch.ones(1, 4)).sum().backward(), 0.5, power=2)

    assert seen == [(0.5, 2)]


def test_state_that_a_failed_step_has_built_is_parked() -> None:
    model = two_layers()
    optimizer = Failing(model.parameters())
    optimizer.fails = True
    with HiFT(model, optimizer) as hift:
        with pytest.raises(RuntimeError, match="after the update"):
            step(model, optimizer)
        hift.settle()
        assert all(map(hift.residency.is_parked, hift.parameters_of(hift.block)))


@pytest.mark.parametrize("parked_dtype", [None, "bfloat16"])
@pytest.mark.filterwarnings("ignore:The weights have 16 bits")
def test_masters_that_a_failed_step_has_changed_in_place_are_told_of(parked_dtype: str | None) -> None:
    model = two_layers().bfloat16()
    optimizer = Failing(model.parameters(), lr=1e-5)  # too small for the weights, not for their masters
    settings = HiFTSettings(master_weights=True, parked_dtype=parked_dtype, group_size=2)
    with HiFT(model, optimizer, settings) as hift:
        step(model, optimizer, torch.bfloat16)
        optimizer.fails = True
        with pytest.raises(RuntimeError, match="after the update"):
            step(model, optimizer, torch.bfloat16)
        hift.settle()
        assert hift.half_updated is not None


def test_a_position_can_be_loaded_after_a_backward_pass() -> None:
    model = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    with HiFT(model, optimizer) as hift:
        saved = hift.state_dict()
        step(model, optimizer)
        model(torch.ones(1, 4)).sum().backward()
        hift.load_state_dict(saved)
        step(model, optimizer)
        assert hift.updates == 1


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_masters_of_mixed_weights_are_refused_by_the_name_of_the_wider(narrow: torch.dtype, wide: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4).to(narrow), nn.Linear(4, 4).to(wide))
    hift = HiFT(model, torch.optim.Adam(model.parameters()), HiFTSettings(master_weights=True))
    with pytest.raises(ValueError, match=f"`1.weight` is {wide}; let all"):
        hift.start()


class WritesData(torch.optim.SGD):
    """As much older code does; torch does not count such changes."""

    fails = False

    def step(self, closure: Any = None) -> None:
        for number, parameter in enumerate(p for p in self.param_groups[0]["params"] if p.grad is not None):
            if self.fails and number == 1:
                raise torch.OutOfMemoryError("made up")
            parameter.data.add_(parameter.grad, alpha=-0.1)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_weights_that_were_changed_without_being_counted_are_told_of(steps_before: int) -> None:
    model = two_layers()
    optimizer = WritesData(model.parameters(), 0.1)
    with HiFT(model, optimizer) as hift:
        for _ in range(steps_before):
            step(model, optimizer)
        optimizer.fails = True
        with pytest.raises(torch.OutOfMemoryError):
            step(model, optimizer)
        touched = hift.touched()
        hift.settle()
        assert touched == [f"{hift.block.index}.weight"]
        assert hift.half_updated is not None
        assert touched[0] in hift.half_updated


def test_the_message_of_nan_within_a_fused_update_does_not_say_that_all_is_as_before() -> None:
    model = two_layers()
    optimizer = WritesData(model.parameters(), 0.1)
    with HiFT(model, optimizer, HiFTSettings(update="fused")):
        (model(torch.ones(1, 4)).sum() + model[1].weight.sum() * float("nan")).backward()
        with pytest.raises(NonfiniteError, match="has NaN") as failure:
            optimizer.step()
    assert "as they were" not in str(failure.value)
