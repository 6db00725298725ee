"""Optimizers that pieces of weights would lead astray are found out before a weight is changed."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hift_lightning.engine.elementwise import probe
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.settings import HiFTSettings


class ByHand(Optimizer):
    """Gradient descent with an update of one's own."""

    def __init__(self, params: Iterable[nn.Parameter], **settings: Any) -> None:
        super().__init__(params, {"lr": 0.1, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            self.begin(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.direction(parameter, parameter.grad, group), alpha=group["lr"])

    def begin(self, group: dict[str, Any]) -> None:
        pass

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return gradient


class CountsOnItself(ByHand):
    count = 0

    def begin(self, group: dict[str, Any]) -> None:
        self.count += 1

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return gradient / self.count


class MomentumInAnAttribute(ByHand):
    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params)
        self.momentum: dict[nn.Parameter, Tensor] = {}

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return self.momentum.setdefault(parameter, torch.zeros_like(parameter)).mul_(0.9).add_(gradient)


class CountsInATensor(ByHand):
    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, count=torch.zeros(()))

    def begin(self, group: dict[str, Any]) -> None:
        group["count"] += 1

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return gradient / group["count"]


class CountsUnderAName(ByHand):
    def begin(self, group: dict[str, Any]) -> None:
        self.state["count"] = self.state.get("count", 0) + 1

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return gradient / self.state["count"]


class CountsForItsLog(ByHand):
    calls = 0

    def begin(self, group: dict[str, Any]) -> None:
        self.calls += 1


class Projector:
    def apply(self, gradient: Tensor) -> Tensor:
        return gradient.sign()


class KeepsAnObject(ByHand):
    """As GaLore and APOLLO do."""

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        projector: Projector = self.state[parameter].setdefault("projector", Projector())
        return projector.apply(gradient)


class DrawsNoise(ByHand):
    """Stochastic gradient Langevin dynamics."""

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return gradient + 1e-3 * torch.randn_like(gradient)


class FactorsLargeOnes(ByHand):
    """As variants of Adafactor that keep rows and columns of large matrices only."""

    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if parameter.dim() < 2 or min(parameter.shape) < 32:
            return gradient / state.setdefault("v", torch.ones_like(gradient)).lerp_(gradient.square(), 0.1).sqrt()
        rows = state.setdefault("rows", torch.ones_like(gradient[:, :1]))
        return gradient / rows.lerp_(gradient.square().mean(1, keepdim=True), 0.1).sqrt()


class WantsHeads(ByHand):
    def direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return gradient.view(96, -1).view(parameter.shape)


class HoldsOthers(Optimizer):
    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        params = list(params)
        super().__init__(params, {})
        self.parts = {"matrices": [torch.optim.SGD(params, 0.1)]}

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for part in self.parts["matrices"]:
            part.step()


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


def run(
    make: Callable[..., Optimizer], width: int = 8, dtype: torch.dtype = torch.float32, **settings: Any
) -> nn.Module:
    model = network(width).to(dtype)
    optimizer = make(model.parameters())
    inputs = torch.randn(4, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    with HiFT(model, optimizer, HiFTSettings(**settings)):
        for _ in range(6):
            model(inputs).square().mean().backward()
            optimizer.step()
    return model


KEPT_APART = [CountsOnItself, MomentumInAnAttribute, CountsInATensor, CountsUnderAName]


@pytest.mark.parametrize("kind", KEPT_APART)
@pytest.mark.parametrize("update", ["streamed", "fused"])
def test_what_is_kept_outside_of_the_state_is_refused_in_pieces(kind: type[Optimizer], update: str) -> None:
    run(kind)
    with pytest.raises(
        ConfigurationError, match=f"`{kind.__name__}` could not be shown to treat parameters one by one"
    ):
        run(kind, update=update)


@pytest.mark.parametrize("kind", KEPT_APART)
def test_what_is_kept_outside_of_the_state_is_refused_with_masters(kind: type[Optimizer]) -> None:
    with pytest.raises(
        ConfigurationError, match=f"`{kind.__name__}` does not come to the same where masters are stepped"
    ):
        run(kind, dtype=torch.bfloat16, master_weights=True)


@pytest.mark.parametrize("settings", [{"update": "streamed"}, {"update": "fused"}], ids=str)
def test_what_makes_no_difference_is_not(settings: dict[str, Any]) -> None:
    expected = run(CountsForItsLog).state_dict()
    streamed = run(CountsForItsLog, **settings).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in streamed.items())
    run(CountsForItsLog, dtype=torch.bfloat16, master_weights=True)


@pytest.mark.parametrize("kind", [KeepsAnObject, DrawsNoise, WantsHeads])
def test_what_comes_to_the_same_with_masters_is_not(kind: type[Optimizer]) -> None:
    run(kind, 96, dtype=torch.bfloat16, master_weights=True)


def test_8_bit_state_of_large_matrices_is_tried() -> None:
    from torchao.optim import AdamWFp8

    run(AdamWFp8, 256, dtype=torch.bfloat16, master_weights=True)
    run(AdamWFp8, 256, update="streamed")


def test_a_trial_draws_no_random_numbers() -> None:
    model = network()
    before = torch.get_rng_state()
    probe(DrawsNoise(model.parameters()), model[0].weight, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.NAdam])
def test_torchs_own_optimizers_come_to_the_same_with_masters(make: Callable[..., Optimizer]) -> None:
    model = network(64)
    found = probe(make(model.parameters()), model[0].weight, torch.float32)
    assert found.self_contained
    assert found.separate


def test_a_trial_leaves_the_optimizer_as_it_is() -> None:
    model = network()
    optimizer = MomentumInAnAttribute(model.parameters())
    optimizer.momentum[model[0].weight] = torch.ones(8, 8)
    before = copy.deepcopy(model.state_dict())
    assert not probe(optimizer, model[0].weight, torch.float32).self_contained
    assert list(optimizer.momentum) == [model[0].weight]
    assert torch.equal(optimizer.momentum[model[0].weight], torch.ones(8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_an_optimizer_does_to_large_matrices_alone_is_found_out(tmp_path: Path) -> None:
    model = network(64)
    assert not probe(FactorsLargeOnes(model.parameters()), model[0].weight, torch.float32).elementwise
    expected = run(FactorsLargeOnes, 64).state_dict()
    cut = run(FactorsLargeOnes, 64, update="streamed", window="8KiB", offload=str(tmp_path)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in cut.items())


def test_a_trial_that_fails_is_a_sentence() -> None:
    with pytest.raises(ConfigurationError, match=r"`WantsHeads` was tried on a small matrix.*use `update='block'`"):
        run(WantsHeads, 96, update="streamed")


def test_optimizers_in_a_container_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="`HoldsOthers` steps another one, the `SGD` in its `parts`"):
        run(HoldsOthers)
