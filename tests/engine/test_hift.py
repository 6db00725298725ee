"""The engine in a plain PyTorch loop, without Lightning."""

import contextlib
import copy
import gc
import subprocess
import sys
import warnings

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from hift_lightning import HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.settings import HiFTSettings
from tests.adversarial import Adversarial
from tests.comparing import assert_same
from tests.reference_loop import reference_loop, turns_of
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


def plain_loop(model, optimizer, settings, batches, scheduler=None, clip=None):
    losses = []
    with HiFT(model, optimizer, settings) as hift:
        delayed = hift.delay(scheduler) if scheduler else None
        for batch in batches:
            loss = model.loss(batch)
            losses.append(loss.item())
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if delayed:
                delayed.step()
    return hift, losses


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_plain_loop_equals_the_reference_loop(group_size, clip):
    batches = make_batches(9)
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = HiFTSettings(group_size=group_size, order="bottom2up", lr_update="cycle_once")
    hift, losses = plain_loop(model, optimizer, settings, batches, LinearLR(optimizer, 1.0, 0.1, total_iters=3), clip)
    reference = SmallTransformer()
    expected_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    expected, _ = reference_loop(
        reference,
        expected_optimizer,
        [block.parameters for block in hift.plan.blocks],
        turns_of("bottom2up", len(hift.plan.blocks)),
        batches,
        clip_norm=clip,
        scheduler=LinearLR(expected_optimizer, 1.0, 0.1, total_iters=3),
    )
    assert losses == expected
    for left, right in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(left, right)


def test_gradients_are_freed_and_only_the_active_block_requires_one():
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with HiFT(model, optimizer) as hift:
        for batch in make_batches(LAYERS):
            active = set(hift.block.parameters)
            assert {name for name, p in model.named_parameters() if p.requires_grad} == active
            model.loss(batch).backward()
            assert {name for name, p in model.named_parameters() if p.grad is not None} == active
            optimizer.step()
            assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_accumulates_over_several_backwards():
    model, twice = SmallTransformer(), SmallTransformer()
    batch, other = make_batches(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with HiFT(model, optimizer) as hift:
        model.loss(batch).backward()
        model.loss(other).backward()
        optimizer.step()
    assert hift.updates == 1
    (twice.loss(batch) + twice.loss(other)).backward()
    expected = twice.head.weight.detach() - 0.1 * twice.head.weight.grad
    assert torch.allclose(model.head.weight, expected, atol=1e-7)


def test_a_step_without_backward_keeps_the_turn():
    model = SmallTransformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with HiFT(model, optimizer) as hift:
        optimizer.step()
        assert hift.updates == 0
        assert hift.block.name == "head"


def test_a_closure_is_run_once_and_before_state_is_paged_in():
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = make_batches(2 * LAYERS)
    calls = []
    with HiFT(model, optimizer) as hift:
        for batch in batches:

            def closure(batch=batch):
                parked = [hift.residency.is_parked(p) for p in model.parameters()]
                calls.append(sum(parked))
                loss = model.loss(batch)
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
    everything = len(list(model.parameters()))
    assert calls[LAYERS:] == [everything] * LAYERS  # while a closure runs, all state is parked
    assert hift.cycle == 2


def test_a_grad_scaler_in_a_plain_loop_keeps_the_turn_on_overflow():
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with HiFT(model, optimizer) as hift:
        for i, batch in enumerate(make_batches(3)):
            scaler.scale(model.loss(batch) * (float("inf") if i == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            if i == 1:
                hift.settle()
    assert hift.updates == 2


def test_an_optimizer_can_be_made_from_the_parameters_that_are_trained():
    model = SmallTransformer()
    settings = HiFTSettings(frozen=["embedding.*"])
    hift = HiFT(model, lambda parameters: torch.optim.SGD(parameters, lr=0.1), settings)
    held = {id(p) for group in hift.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if not name.startswith("embedding")}


def test_state_dict_brings_the_position_back():
    batches = make_batches(7)
    straight = SmallTransformer()
    optimizer = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    plain_loop(straight, optimizer, HiFTSettings(order="random"), batches)

    first = SmallTransformer()
    optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    hift, _ = plain_loop(first, optimizer, HiFTSettings(order="random"), batches[:3])
    saved = hift.state_dict(), optimizer.state_dict()

    optimizer = torch.optim.AdamW(first.parameters(), lr=1.0)
    with HiFT(first, optimizer, HiFTSettings(order="random")) as hift:
        hift.load_state_dict(saved[0])
        hift.load_optimizer_state_dict(saved[1])
        for batch in batches[3:]:
            first.loss(batch).backward()
            optimizer.step()
    for left, right in zip(first.parameters(), straight.parameters(), strict=True):
        assert torch.equal(left, right)


def test_state_of_parameters_in_another_order_is_refused_where_their_names_are_known():
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters())
    hift, _ = plain_loop(model, optimizer, None, make_batches(LAYERS))
    saved = optimizer.state_dict(), hift.state_dict()
    other = HiFT(model, torch.optim.AdamW(list(model.parameters())[::-1]))
    with pytest.raises(ConfigurationError, match="the same parameters in another order or other param groups"):
        other.load_optimizer_state_dict(*saved)


@pytest.mark.parametrize("group_size", [0, -1, True, 1.5, "2"])
def test_a_bad_group_size_is_named(group_size):
    with pytest.raises(ConfigurationError, match="`group_size="):
        HiFTSettings(group_size=group_size)


def test_the_engine_imports_without_lightning_hydra_or_transformers():
    code = (
        "import sys, types; package = types.ModuleType('hift_lightning'); "
        "package.__path__ = ['hift_lightning']; sys.modules['hift_lightning'] = package; "
        "import hift_lightning.engine.hift; "
        "print([m for m in ('lightning', 'hydra', 'omegaconf', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_wrapper_of_an_optimizer_is_refused_where_pieces_are_stepped():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = SmallTransformer()
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match="`Fabric.*` wraps another optimizer"):
        HiFT(model, optimizer, HiFTSettings(update="streamed"))


def test_a_tied_weight_that_is_frozen_under_another_name_is_not_warned_of():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False))
    model[2].weight = model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HiFT(model, torch.optim.AdamW(model.parameters()), HiFTSettings(frozen=["2.*"]))


# --- gradients that do not belong to the step ---------------------------------------------------------------------


@pytest.mark.parametrize("update", ["block", "streamed"])
def test_a_gradient_outside_of_the_active_block_is_refused_before_anything_is_changed(update):
    model = SmallTransformer()
    with HiFT(model, torch.optim.AdamW(model.parameters()), HiFTSettings(update=update)) as hift:
        before = copy.deepcopy(model.state_dict())
        model.requires_grad_(True)
        model.loss(make_batches(1)[0]).backward()
        with pytest.raises(ConfigurationError, match=r"`embedding.weight` has a gradient and is not in"):
            hift.optimizer.step()
        assert_same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("starts_as", ["in the middle", "at the start"])
def test_layers_that_are_unfrozen_while_training_are_refused(starts_as):
    model = SmallTransformer()
    model.embedding.requires_grad_(False)
    with HiFT(model, torch.optim.AdamW(model.parameters())) as hift:
        if starts_as == "in the middle":
            model.loss(make_batches(1)[0]).backward()
            hift.optimizer.step()
        model.embedding.requires_grad_(True)
        model.loss(make_batches(1)[0]).backward()
        with pytest.raises(ConfigurationError, match=r"`embedding.weight` has a gradient and is not in"):
            hift.optimizer.step()


def test_layers_that_are_frozen_after_the_blocks_were_cut_are_refused():
    model = SmallTransformer()
    hift = HiFT(model, torch.optim.AdamW(model.parameters()))
    model.embedding.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"`embedding.weight` has been frozen since.*with `frozen="):
        hift.start()
    assert not hift.active
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_layers_that_are_frozen_while_they_have_their_turn_are_refused(update):
    model = SmallTransformer()
    with HiFT(model, torch.optim.AdamW(model.parameters()), HiFTSettings(update=update)) as hift:
        model.head.requires_grad_(False)
        model.loss(make_batches(1)[0]).backward()
        with pytest.raises(
            ConfigurationError, match=r"`head.weight` is in the active block `head` and has been frozen"
        ):
            hift.optimizer.step()


@pytest.mark.parametrize("optimizer", ["the same", "another"])
def test_a_second_hift_on_a_model_that_is_being_trained_is_refused(optimizer):
    model = SmallTransformer()
    first = torch.optim.AdamW(model.parameters())
    hift = HiFT(model, first)
    hift.start()
    second = first if optimizer == "the same" else torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigurationError, match=r"`embedding.weight` is in the blocks of another HiFT.*`finish\(\)`"):
        HiFT(model, second)
    hift.finish()
    assert len(HiFT(model, second).plan.blocks) == LAYERS


def test_what_a_hift_that_is_gone_has_left_can_be_trained_again():
    model = SmallTransformer()

    def start():
        HiFT(model, torch.optim.AdamW(model.parameters())).start()

    start()
    gc.collect()
    model.requires_grad_(True)
    assert len(HiFT(model, torch.optim.AdamW(model.parameters())).plan.blocks) == LAYERS


def test_a_model_can_be_moved_while_it_trains():
    model = SmallTransformer()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with HiFT(model, torch.optim.SGD(model.parameters(), lr=0.1)):
            model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.head.weight.dtype == torch.float64


@pytest.mark.parametrize("update", ["block", "streamed"])
def test_state_that_one_hift_has_parked_in_bf16_another_takes_as_it_was(update):
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        with HiFT(model, optimizer, HiFTSettings(update=update, parked_dtype="bfloat16")) as hift:
            for batch in make_batches(2 * LAYERS):
                model.loss(batch).backward()
                optimizer.step()
            assert hift.residency.load(model.head.weight)["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kept_from", ["toggle_optimizer", "by hand"])
def test_one_of_several_optimizers_is_stepped_while_its_weights_are_kept_from_the_loss_of_the_other(kept_from):
    class StepsBoth(Adversarial):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            losses = list(self.losses(batch))
            self.manual_backward(losses[1])
            if kept_from == "toggle_optimizer":
                self.toggle_optimizer(first)
            else:
                before = [p.requires_grad for p in self.discriminator.parameters()]
                self.discriminator.requires_grad_(False)
            self.manual_backward(losses[0])
            first.step()
            second.step()
            if kept_from == "toggle_optimizer":
                self.untoggle_optimizer(first)
            else:
                for parameter, required_grad in zip(self.discriminator.parameters(), before, strict=True):
                    parameter.requires_grad_(required_grad)

    trainer_ = trainer(HiFTStrategy(group_size=99))
    trainer_.fit(StepsBoth(), loader(list(torch.randn(4, 6, 4))))
    assert [engine.updates for engine in trainer_.strategy.engines] == [4, 4]


def test_of_two_optimizers_of_one_model_a_hift_is_made_while_the_other_trains():
    model = SmallTransformer()
    layers, rest = model.layers.parameters(), [*model.embedding.parameters(), *model.head.parameters()]
    optimizers = [torch.optim.SGD(parameters, lr=0.1) for parameters in (layers, rest)]
    with HiFT(model, optimizers[0], others=[optimizers[1]]):
        assert len(HiFT(model, optimizers[1], others=[optimizers[0]]).plan.blocks) == 2


def test_an_optimizer_may_have_other_arguments_than_a_closure():
    class Scaled(torch.optim.SGD):
        @torch.no_grad()
        def step(self, scale=1.0):
            scales.append(scale)
            super().step()

    scales = []
    model = SmallTransformer()
    with HiFT(model, Scaled(model.parameters(), lr=0.1)) as hift:
        model.loss(make_batches(1)[0]).backward()
        hift.optimizer.step(0.5)
        assert hift.updates == 1
    assert scales == [0.5]


class Counting(torch.optim.SGD):
    """Counts its calls in its param group, as apex does."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["calls"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["calls"] += 1
        return super().step(closure)


def test_with_masters_too_an_optimizer_counts_one_call_a_step():
    model = SmallTransformer().to(torch.bfloat16)
    optimizer = Counting(model.parameters())
    with HiFT(model, optimizer, HiFTSettings(master_weights=True)) as hift:
        for _ in range(LAYERS):
            sum(p.float().square().sum() for p in model.parameters() if p.requires_grad).backward()
            optimizer.step()
    assert optimizer.param_groups[0]["calls"] == hift.updates == LAYERS


@pytest.mark.parametrize("settings", [{}, {"update": "streamed"}, {"master_weights": True}], ids=str)
@pytest.mark.parametrize("when", ["pre", "post"])
def test_what_hooks_set_in_param_groups_stays(settings, when):
    model = SmallTransformer()
    if "master_weights" in settings:
        model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def halve(optimizer, args, kwargs):
        optimizer.param_groups[0]["lr"] /= 2

    getattr(optimizer, f"register_step_{when}_hook")(halve)
    with HiFT(model, optimizer, HiFTSettings(**settings)):
        for _ in range(LAYERS):
            sum(p.float().square().sum() for p in model.parameters() if p.requires_grad).backward()
            optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 / 2**LAYERS


def test_gradients_of_frozen_parameters_from_before_the_start_are_freed():
    model = SmallTransformer()
    model.loss(make_batches(1)[0]).backward()
    model.embedding.requires_grad_(False)
    before = model.embedding.weight.detach().clone()
    with HiFT(model, torch.optim.AdamW(model.parameters())) as hift:
        model.loss(make_batches(1)[0]).backward()
        hift.optimizer.step()
    assert torch.equal(model.embedding.weight, before)


class StateForAll(torch.optim.SGD):
    """Builds the state of all parameters in its first step."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.built = False

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters if not self.built else ():
            self.state[p]["momentum"] = torch.zeros_like(p)
        self.built = True
        for p in parameters:
            if p.grad is not None:
                p.sub_(self.state[p]["momentum"].mul_(0.9).add_(p.grad), alpha=0.1)


@pytest.mark.parametrize("settings", [{}, {"parked_dtype": "bfloat16"}, {"offload": "folder"}], ids=str)
def test_state_that_is_built_for_all_parameters_at_once_is_parked_and_kept(settings, tmp_path):
    module = SmallTransformer(StateForAll)
    strategy = HiFTStrategy(**settings | ({"offload": tmp_path} if "offload" in settings else {}))
    parked = []

    class Looks(Callback):
        def on_train_batch_end(self, *arguments):
            parked.append(all(map(strategy.hift.residency.is_parked, module.parameters())))

    trainer(strategy, callbacks=[Looks()]).fit(module, loader(make_batches(2 * LAYERS)))
    assert parked == [True] * 2 * LAYERS


@pytest.mark.parametrize(("start_factor", "warned"), [(0.0, True), (0.1, False)])
def test_a_first_cycle_at_rate_0_is_warned_of(start_factor, warned):
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters())
    # rises from the beginning, and has come back to 0 before the third cycle
    scheduler = LambdaLR(optimizer, lambda step: start_factor if step < LAYERS else float(step < 2 * LAYERS))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plain_loop(model, optimizer, HiFTSettings(), make_batches(3 * LAYERS), scheduler)
    said = [str(each.message) for each in told if "steps change nothing" in str(each.message)]
    assert len(said) == warned
    assert all(f"the first {LAYERS} steps" in each for each in said)


def test_gradients_from_before_the_start_are_freed():
    model = SmallTransformer()
    model.loss(make_batches(1)[0]).backward()
    before = copy.deepcopy(model.state_dict())
    with HiFT(model, torch.optim.AdamW(model.parameters())) as hift:
        assert all(parameter.grad is None for parameter in model.parameters())
        model.loss(make_batches(1)[0]).backward()
        hift.optimizer.step()
        active = hift.plan.blocks[-1].parameters
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(active)


def test_fused_refuses_a_second_backward_pass_in_one_step():
    model = SmallTransformer()
    batch = make_batches(1)[0]
    with HiFT(model, torch.optim.AdamW(model.parameters()), HiFTSettings(update="fused")) as hift:
        model.loss(batch).backward()
        with pytest.raises(ConfigurationError, match=r"`head.*` has a gradient for the second time in one step"):
            model.loss(batch).backward()
        hift.settle()
        model.loss(batch).backward()
        hift.optimizer.step()
    assert hift.updates == 1


# --- going on in a plain loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parked_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("update", ["block", "streamed"])
def test_state_loaded_by_the_optimizer_itself_while_training_is_what_is_trained_with(update, parked_dtype):
    def state_after(load):
        model = SmallTransformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # moments are what is looked at
        with HiFT(model, optimizer, HiFTSettings(update=update, parked_dtype=parked_dtype)) as hift:
            for batch in make_batches(LAYERS):
                model.loss(batch).backward()
                optimizer.step()
            if load:
                state = copy.deepcopy(optimizer.state_dict())
                for moments in state["state"].values():
                    moments["exp_avg"].fill_(100.0)
                optimizer.load_state_dict(state)
            for batch in make_batches(LAYERS):
                model.loss(batch).backward()
                optimizer.step()
            return [hift.optimizer.state[p]["exp_avg"].float().mean().item() for p in model.parameters()]

    assert all(value < 1 for value in state_after(load=False))
    assert state_after(load=True) == pytest.approx([90.0] * len(state_after(load=True)), rel=0.01)


@pytest.mark.parametrize("delayed", ["before", "after"])
@pytest.mark.parametrize("lr_update", ["cycle", "cycle_once", "step"])
def test_a_plain_loop_goes_on_within_a_cycle_with_the_held_rate(lr_update, delayed):
    batches = make_batches(3 * LAYERS)
    stop = LAYERS + 2

    def start(position=None):
        model = SmallTransformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        hift = HiFT(model, optimizer, HiFTSettings(lr_update=lr_update))
        hift.start()
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        if position is not None:
            hift.load_state_dict(position)
        return model, hift, hift.delay(decay)

    def train(model, hift, scheduler, batches):
        rates = []
        for batch in batches:
            rates.append(hift.optimizer.param_groups[0]["lr"])
            model.loss(batch).backward()
            hift.optimizer.step()
            scheduler.step()
        return rates

    straight, hift, scheduler = start()
    expected = train(straight, hift, scheduler, batches)
    model, hift, scheduler = start()
    rates = train(model, hift, scheduler, batches[:stop])
    saved = copy.deepcopy([each.state_dict() for each in (model, hift.optimizer, hift, scheduler)])
    model, hift, scheduler = start(saved[2] if delayed == "after" else None)
    model.load_state_dict(saved[0])
    hift.load_optimizer_state_dict(saved[1])
    if delayed == "before":
        hift.load_state_dict(saved[2])
    scheduler.load_state_dict(saved[3])
    rates += train(model, hift, scheduler, batches[stop:])
    assert rates == expected
    assert_same(dict(model.state_dict()), dict(straight.state_dict()))


@pytest.mark.parametrize("fails", ["closure", "step"])
def test_a_plain_loop_goes_on_after_a_step_that_failed(fails):
    class Fails(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            loss = super().step(closure)
            if fails == "step" and number == 1:
                raise LookupError
            return loss

    model = SmallTransformer()
    optimizer = Fails(model.parameters())
    with HiFT(model, optimizer) as hift:
        for number, batch in enumerate(make_batches(2 * LAYERS)):

            def closure(number=number, batch=batch):
                loss = model.loss(batch)
                if fails == "closure" and number == 1:
                    raise LookupError
                loss.backward()
                return loss

            with contextlib.suppress(LookupError):
                optimizer.step(closure)
        assert hift.updates == 2 * LAYERS - 1
        assert all(block.visits for block in hift.report().blocks)
