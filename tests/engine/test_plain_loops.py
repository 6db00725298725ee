"""What a user's own loop may do, and what it is told where it trains nothing."""

import copy
import gc
import io
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from hift_lightning.engine.compilation import compile_layers
from hift_lightning.engine.errors import ConfigurationError, NonfiniteError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.settings import HiFTSettings

LAYERS = 4


def network(layers: int = LAYERS, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))


def batch(width: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, scheduler: Any = None) -> None:
    for _ in range(count):
        model(batch()).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]


# --- start and end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"update": "fused"}], ids=str)
def test_an_engine_that_is_dropped_in_training_gives_the_model_back(settings: dict[str, Any]) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())

    def interrupted() -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        HiFT(model, optimizer, HiFTSettings(**settings)).start()
        steps(model, optimizer, 1)

    interrupted()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with HiFT(model, optimizer) as hift:
        assert len(hift.plan.blocks) == LAYERS
        steps(model, optimizer, LAYERS)
    assert len(changed(model, before)) == 2 * LAYERS
    assert all("forward" not in vars(layer) for layer in model)


@pytest.mark.parametrize("update", ["block", "fused"])
def test_a_model_that_is_dropped_in_training_is_freed(update: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    HiFT(model, optimizer, HiFTSettings(update=update)).start()  # type: ignore[arg-type]
    weight = weakref.ref(model[0][0].weight)
    del model, optimizer
    gc.collect()
    assert weight() is None


def test_a_model_in_training_is_not_given_to_another_that_makes_its_optimizer() -> None:
    model = network()
    with (
        HiFT(model, torch.optim.SGD(model.parameters(), 0.1)),
        pytest.raises(ConfigurationError, match="is in the blocks of another HiFT"),
    ):
        HiFT(model, lambda parameters: torch.optim.SGD(parameters, 0.1))


def test_a_start_that_fails_leaves_a_model_that_can_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    hift = HiFT(model, torch.optim.SGD(model.parameters(), 0.1))

    def full(self: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("hift_lightning.engine.residency.Residency.adopt_state", full)
    with pytest.raises(OSError, match="No space"):
        hift.start()
    hift.finish()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_can_go_on_without_hift() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with HiFT(model, optimizer, HiFTSettings(parked_dtype="bfloat16")) as hift:
        steps(model, optimizer, LAYERS)
    hift.residency.page_in(hift.trained.values())
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, 1)
    assert len(changed(model, before)) == 2 * LAYERS


def test_what_another_optimizer_has_is_left_alone_where_the_optimizer_is_made_of_parameters() -> None:
    model = network()
    other = torch.optim.SGD(model[0].parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    with HiFT(model, lambda parameters: torch.optim.SGD(parameters, 0.1), others=[other]) as hift:
        assert len(hift.plan.blocks) == LAYERS - 1
        steps(model, hift.optimizer, LAYERS)
    assert not any(name.startswith("0.") for name in changed(model, before))


def test_settings_that_are_none_are_named() -> None:
    model = network()
    with pytest.raises(ConfigurationError, match=r"`settings=\{'group_size': 2\}` must be `HiFTSettings"):
        HiFT(model, torch.optim.SGD(model.parameters(), 0.1), {"group_size": 2})  # type: ignore[arg-type]


def test_what_is_no_position_is_named() -> None:
    model = network()
    hift = HiFT(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ConfigurationError, match=r"lacks .* nothing that `HiFT.state_dict\(\)` gave"):
        hift.load_state_dict({"updates": 3})


def test_two_optimizers_that_do_not_know_of_each_other_are_told_how() -> None:
    model = network()
    first = HiFT(model, torch.optim.SGD(model[:2].parameters(), 0.1))
    second = HiFT(model, torch.optim.SGD(model[2:].parameters(), 0.1))
    with first, pytest.raises(ConfigurationError, match=r"give each the other's as `others"):
        second.start()


@pytest.mark.parametrize("while_training", ["model", "copy"])
def test_a_model_that_is_pickled_while_its_layers_are_checkpointed_can_be_loaded(while_training: str) -> None:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0) for _ in range(2)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    file = io.BytesIO()
    with HiFT(model, optimizer, HiFTSettings(activation_checkpointing=True)):
        torch.save(model if while_training == "model" else copy.deepcopy(model), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    inputs = torch.randn(3, 2, 8)
    assert torch.equal(loaded(inputs), model(inputs))


def test_a_model_with_compiled_layers_can_be_pickled() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False)
    compile_layers(model, backend="eager")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False), nn.TransformerEncoder)


def test_the_end_of_a_forked_process_leaves_parked_files_alone(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with HiFT(model, optimizer, HiFTSettings(offload=str(tmp_path))) as hift:
        steps(model, optimizer, LAYERS)
        parked = sorted(tmp_path.rglob("*.bin"))
        if (child := os.fork()) == 0:
            try:
                optimizer.state.clear()
                hift.residency._parked_leaves.clear()
                gc.collect()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert parked == sorted(tmp_path.rglob("*.bin")) != []
        steps(model, optimizer, LAYERS)


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["hift", "full"])
def test_a_delayed_schedule_goes_on_after_its_engine(then: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler: Any = CosineAnnealingLR(optimizer, T_max=22)
    with HiFT(model, optimizer) as hift:
        scheduler = hift.delay(scheduler)
        steps(model, optimizer, 10, scheduler)  # ends within a cycle of four
    if then == "full":
        steps(model, optimizer, 12, scheduler)
    else:
        with HiFT(model, optimizer) as hift:
            scheduler = hift.delay(scheduler)
            steps(model, optimizer, 12, scheduler)
    assert scheduler.last_epoch == 22
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_a_schedule_that_is_delayed_again_by_the_same_engine_is_stepped_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler: Any = CosineAnnealingLR(optimizer, T_max=22)
    hift = HiFT(model, optimizer)
    for _ in range(2):
        with hift:
            scheduler = hift.delay(scheduler)
            steps(model, optimizer, LAYERS // 2 + 1, scheduler)
    assert scheduler.last_epoch == LAYERS
    assert hift.state_dict()["held_lr_steps"] == [2]


def test_what_is_set_on_a_delayed_scheduler_is_set_on_the_scheduler() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=8)
    HiFT(model, optimizer).delay(scheduler).T_max = 100
    assert scheduler.T_max == 100


# --- backward and step ------------------------------------------------------------------------------------------------


class WithoutUse(nn.Module):
    """A layer on top that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.pooler = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.body(inputs)
        return result


def test_a_loop_that_trains_nothing_is_told_so() -> None:
    model = WithoutUse()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    told = pytest.warns(UserWarning, match=r"`pooler` had a gradient.*after_backward")
    with HiFT(model, optimizer) as hift, told:
        for _ in range(2 * LAYERS):
            model(batch().requires_grad_()).square().mean().backward()
            optimizer.step()
        assert hift.updates == 0


def test_steps_without_backward_here_and_there_are_not_warned_of() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with HiFT(model, optimizer), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3 * LAYERS):
            optimizer.step()
            steps(model, optimizer, 1)


def test_blocks_below_a_detached_body_are_told_of_where_the_head_is_always_active() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network(), nn.Linear(8, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = self.head(self.body(inputs).detach())
            return result

    model = Detached()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        HiFT(model, optimizer, HiFTSettings(always_active=["head.*"])),
        pytest.warns(UserWarning, match="No gradient reached block"),
        pytest.raises(RuntimeError, match=f"No gradient reached any of the {LAYERS} blocks"),
    ):
        steps(model, optimizer, 20)


class CallsTwice(torch.optim.SGD):
    """Sharpness-aware minimization as one optimizer: a second gradient at weights that it has moved."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)()
        with_gradient = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        moves = [0.05 * p.grad for p in with_gradient if p.grad is not None]
        for parameter, move in zip(with_gradient, moves, strict=True):
            parameter.add_(move)
            parameter.grad = None
        torch.enable_grad()(closure)()
        for parameter, move in zip(with_gradient, moves, strict=True):
            parameter.sub_(move)
        super().step()
        return loss


def run_with_nan_in_call(call: int, nonfinite: str) -> tuple[HiFT, list[str], bool]:
    model = network()
    optimizer = CallsTwice(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss: Tensor = model(batch()).square().mean() * (float("nan") if calls == call else 1.0)
        loss.backward()
        return loss

    with HiFT(model, optimizer, HiFTSettings(nonfinite=nonfinite)) as hift:  # type: ignore[arg-type]
        optimizer.step(closure)
    moved = [n for n, p in model.named_parameters() if not torch.allclose(p, before[n], rtol=0, atol=1e-6)]
    return hift, moved, any(bool(p.isnan().any()) for p in model.parameters())


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.filterwarnings("ignore:A step is left out")
def test_a_closure_that_is_called_twice_is_looked_at_twice(call: int) -> None:
    hift, moved, nan = run_with_nan_in_call(call, "skip")
    assert (hift.updates, hift.skipped_steps, moved, nan) == (0, 1, [], False)
    with pytest.raises(NonfiniteError, match="has NaN in update 1"):
        run_with_nan_in_call(call, "raise")


@pytest.mark.parametrize("update", ["streamed", "fused"])
def test_a_step_hook_that_would_see_no_gradient_is_refused(update: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    seen = []
    with HiFT(model, optimizer, HiFTSettings(update=update)) as hift:  # type: ignore[arg-type]
        optimizer.register_step_pre_hook(lambda *_: seen.append(hift.has_gradient))
        model(batch()).square().mean().backward()
        with pytest.raises(ConfigurationError, match=r"registered on `SGD` after training began.*update_after_hooks"):
            optimizer.step()
        hift.settle()
        hift.update_after_hooks()
        steps(model, optimizer, 1)
    assert seen == [update == "streamed"]


def test_a_step_hook_that_a_closure_comes_after_is_not() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    seen = []

    def closure() -> None:
        model(batch()).square().mean().backward()

    with HiFT(model, optimizer, HiFTSettings(update="streamed")) as hift:
        optimizer.register_step_pre_hook(lambda *_: seen.append(hift.updates))
        optimizer.step(closure)  # type: ignore[arg-type]
        assert (seen, hift.updates) == ([0], 1)


def test_a_scaled_loss_is_refused_where_gradients_are_used_in_backward() -> None:
    model = network()
    hift = HiFT(model, torch.optim.SGD(model.parameters(), 0.1), HiFTSettings(update="fused"))
    with hift, pytest.raises(ConfigurationError, match="before a GradScaler takes its scale out"):
        hift.after_backward(scaled=True)


@pytest.mark.filterwarnings("ignore:A step is left out")
def test_a_step_to_be_left_out_under_a_grad_scaler_passes_its_turn() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    with HiFT(model, optimizer, HiFTSettings(nonfinite="skip")) as hift:
        for i in range(3):
            loss = model(batch()).square().mean() * (float("nan") if i == 1 else 1.0)
            scaler.scale(loss).backward()
            hift.after_backward(loss, scaled=True)
            if hift.will_skip:
                hift.pass_turn()
            else:
                scaler.step(optimizer)
                scaler.update()
        assert (hift.updates, hift.skipped_steps) == (2, 1)


def test_frozen_again_after_something_has_set_what_requires_a_gradient() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with HiFT(model, optimizer) as hift:
        for _ in range(LAYERS):
            model.requires_grad_(True)
            hift.freeze_again()
            steps(model, optimizer, 1)
        assert hift.updates == LAYERS
    hift.freeze_again()
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- saving and resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "while"])
def test_state_that_was_rounded_in_loading_is_warned_of_where_there_are_masters(when: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, HiFT]:
        model = network().bfloat16()
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer, HiFT(model, optimizer, HiFTSettings(master_weights=True))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(LAYERS):
            model(batch(dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()

    model, optimizer, hift = make()
    with hift, warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
        saved, position = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(hift.state_dict())
    model, optimizer, hift = make()
    told = pytest.warns(UserWarning, match=r"has come in 16 bits.*rounded by `optimizer.load_state_dict`")
    if when == "before":
        optimizer.load_state_dict(saved)
    with told, hift:
        if when == "while":
            optimizer.load_state_dict(saved)
    model, optimizer, hift = make()
    hift.load_optimizer_state_dict(saved, position)
    with hift, warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)


class TwoHeads(nn.Module):
    """Of whose heads the second one is never used."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs):
        return self.used(inputs)


def train_one_head(hift, optimizer, steps):
    for _ in range(steps):
        loss = hift.model(torch.ones(1, 4)).sum()
        if loss.requires_grad:
            loss.backward()
        hift.after_backward(loss)
        optimizer.step()


def two_heads():
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return HiFT(model, optimizer), optimizer


NEVER_REACHED = r"No gradient reached block \d \(`unused`, 6 steps\) in this run"


def test_the_warning_at_the_end_leaves_the_model_as_it_was_where_warnings_are_errors():
    hift, optimizer = two_heads()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=NEVER_REACHED)
        hift.start()
        train_one_head(hift, optimizer, 12)
        with pytest.raises(UserWarning, match=NEVER_REACHED):
            hift.finish()
    assert not hift.active
    assert all(parameter.requires_grad for parameter in hift.model.parameters())


def test_a_run_within_an_except_block_is_told_at_its_end_and_one_that_fails_is_not():
    hift, optimizer = two_heads()
    try:
        raise RuntimeError("out of memory")
    except RuntimeError:
        hift.start()
        train_one_head(hift, optimizer, 12)
        with pytest.warns(UserWarning, match=NEVER_REACHED):
            hift.finish()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=NEVER_REACHED)
        with pytest.raises(RuntimeError, match="fails"), hift:  # noqa: PT012
            train_one_head(hift, optimizer, 12)
            raise RuntimeError("fails")


def test_visits_without_a_gradient_are_those_of_the_run_that_goes_on():
    hift, optimizer = two_heads()
    hift.start()
    train_one_head(hift, optimizer, 2)
    saved = hift.state_dict()
    train_one_head(hift, optimizer, 8)
    hift.load_state_dict(saved)
    assert [(block.visits, block.without_gradient) for block in hift.report().blocks] == [(1, 0), (1, 0)]
    train_one_head(hift, optimizer, 4)
    assert sorted(block.without_gradient for block in hift.report().blocks) == [0, 2]
