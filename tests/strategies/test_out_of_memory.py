"""Out of memory, forced by capping the device in each phase of a step."""

import gc
import re
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hift_lightning import HiFT, HiFTSettings, HiFTStrategy
from hift_lightning.engine.conversion import parameters_stay_themselves
from tests import simulated_accelerator as sim
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

UPDATES = ["block", "streamed"]
FAILS_AT = LAYERS + 1


class PlainLoop:
    """A loop on the device that can be made to fail in a phase of a step."""

    def __init__(
        self, device, update, make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=False)
    ):
        self.device = device
        self.model = SmallTransformer()
        with parameters_stay_themselves(torch.device(device.type)):
            self.model.to(device.type)
        self.optimizer = make_optimizer(self.model.parameters())
        self.hift = HiFT(self.model, self.optimizer, HiFTSettings(update=update, window="6KiB"))

    def step(self, batch, phase=None):
        batch = [tensor.to(self.device.type) for tensor in batch]
        if phase == "forward":
            self.device.cap_here()
        loss = self.model.loss(batch)
        if phase == "backward":
            self.device.cap_here()
        loss.backward()
        if phase == "page in":
            self.device.cap_here()
        self.optimizer.step()

    def snapshot(self):
        return (
            {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()},
            {
                i: {key: value.clone() for key, value in state.items()}
                for i, state in self.optimizer.state_dict()["state"].items()
            },
        )


def assert_same(left, right):
    for weights, expected in zip(left, right, strict=True):
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            if isinstance(value, dict):
                assert_same([value], [expected[key]])
            else:
                assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("phase", ["forward", "backward", "page in"])
def test_before_the_update_it_is_as_if_the_step_had_not_begun(device, update, phase):
    failing, straight = PlainLoop(device, update), PlainLoop(device, update)
    batches = make_batches(2 * LAYERS + 2)
    small = [tensor[:2] for tensor in batches[FAILS_AT]]
    with straight.hift, failing.hift:
        for i, batch in enumerate(batches):
            if i != FAILS_AT:
                straight.step(batch)
                failing.step(batch)
                continue
            before = failing.snapshot()
            with pytest.raises(torch.OutOfMemoryError):
                failing.step(batch, phase)
            device.no_cap()
            failing.hift.settle()
            assert failing.hift.updates == FAILS_AT
            assert_same(failing.snapshot(), before)
            failing.step(small)
            straight.step(small)
    assert_same(failing.snapshot(), straight.snapshot())


class FailsInStep(torch.optim.AdamW):
    """Caps the device when its own step has begun."""

    fail_at = None

    def __init__(self, parameters, device):
        super().__init__(parameters, lr=1e-2)
        self.device = device

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        busy = any(p.grad is not None for group in self.param_groups for p in group["params"])
        self.calls = getattr(self, "calls", 0) + busy
        if busy and self.calls == self.fail_at:
            with_gradient = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            with_gradient[0].add_(1.0)  # what it would have done before memory ran out
            self.device.cap_here()
            torch.empty(10_000, device=self.device.type)
        return super().step()


# Python 3.10 has no place for it below a traceback, and warns
NAMED = r"the weights of .* have changed" if sys.version_info >= (3, 11) else None


def everything_told(error):
    return "\n".join([str(error), *error.__notes__])


def leave_the_with(hift, step):
    with hift:
        step()


def settle_and_go_on(hift, step):
    with hift:
        try:
            step()
        except Exception:
            hift.settle()
            raise


def finish_at_last(hift, step):
    hift.start()
    try:
        step()
    finally:
        hift.finish()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 warns instead of adding a note")
@pytest.mark.parametrize("update", [*UPDATES, "fused"])
@pytest.mark.parametrize("ending", [leave_the_with, settle_and_go_on, finish_at_last])
def test_a_plain_loop_is_told_the_touched_weights_too(device, update, ending):
    loop = PlainLoop(device, update, lambda parameters: FailsInStep(parameters, device))
    batches = make_batches(LAYERS + 1)

    def train():
        for batch in batches[:-1]:
            loop.step(batch)
        loop.weights, _ = loop.snapshot()
        loop.optimizer.fail_at = loop.optimizer.calls + (1 if update == "block" else 2)
        loop.step(batches[-1])

    with pytest.raises(torch.OutOfMemoryError, match=NAMED) as failure:
        ending(loop.hift, train)
    device.no_cap()
    (note,) = failure.value.__notes__  # told once, whoever has settled
    now, _ = loop.snapshot()
    changed = [name for name, weights in now.items() if not torch.equal(weights, loop.weights[name])]
    assert changed
    assert all(name in note for name in changed)
    assert "head" in note
    assert "a smaller batch" in note
    assert loop.hift.updates == LAYERS


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 warns instead of adding a note")
@pytest.mark.parametrize("update", [*UPDATES, "fused"])
def test_any_error_inside_the_optimizer_tells_them_and_one_before_it_tells_nothing(update):
    model = SmallTransformer()
    own = {p.data_ptr() for p in model.parameters()}

    class Fails(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad)
                        if p.data_ptr() in own:  # and not where it is tried on a small matrix
                            raise KeyError("momentum")

    optimizer = Fails(model.parameters(), lr=0.1)
    batch = make_batches(1)[0]
    settings = HiFTSettings(update=update)

    def train(optimizer, error=None):
        with HiFT(model, optimizer, settings):
            model.loss(batch).backward()
            optimizer.step()
            raise error

    with pytest.raises(KeyError) as failure:
        train(optimizer)
    (note,) = failure.value.__notes__
    assert re.search(r"the weights of (norm|head)\S+ have changed", note)
    assert "a smaller batch" not in everything_told(failure.value)

    with pytest.raises(ZeroDivisionError) as failure:
        train(torch.optim.SGD(model.parameters()), ZeroDivisionError())
    assert not hasattr(failure.value, "__notes__")


def test_half_updated_weights_are_not_saved_as_a_checkpoint(tmp_path):
    class Fails(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            self.calls = getattr(self, "calls", 0) + 1
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad)
                        if self.calls == LAYERS:
                            raise ValueError("broken")

    module = SmallTransformer(lambda parameters: Fails(parameters, lr=0.1))
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_on_exception=True)
    trainer_ = trainer(callbacks=[checkpoint], enable_checkpointing=True)
    with (
        pytest.raises(ValueError, match="broken"),
        pytest.warns(UserWarning, match=r"No checkpoint is saved .*: Block `embeddings` was being updated"),
    ):
        trainer_.fit(module, loader(make_batches(LAYERS)))
    (saved,) = tmp_path.iterdir()
    assert torch.load(saved, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("update", [*UPDATES, "fused"])
def test_after_it_inside_the_optimizer_one_can_save_all_the_same_and_go_on(device, update, tmp_path):
    def make(parameters):
        module.optimizer_to_fail = FailsInStep(parameters, device)
        return module.optimizer_to_fail

    class Fails(SmallTransformer):
        def on_before_backward(self, loss):
            if self.trainer.global_step == LAYERS:
                self.optimizer_to_fail.fail_at = self.optimizer_to_fail.calls + (1 if update == "block" else 2)

    module = Fails(make)
    trainer_ = trainer(HiFTStrategy(update=update, window="6KiB"), accelerator=device.type, devices=1)
    batches = make_batches(2 * LAYERS)
    with pytest.raises(torch.OutOfMemoryError):
        trainer_.fit(module, loader(batches))
    device.no_cap()
    with pytest.warns(UserWarning, match=r"saved of weights that are updated in part: Block `head` was being updated"):
        trainer_.save_checkpoint(tmp_path / "after.ckpt")

    again = trainer(
        HiFTStrategy(update=update, window="6KiB"),
        accelerator=device.type,
        devices=1,
        max_steps=2 * LAYERS,
        max_epochs=-1,
    )
    smaller = [[tensor[:2] for tensor in batch] for batch in batches]
    again.fit(SmallTransformer(), loader(smaller), ckpt_path=tmp_path / "after.ckpt")
    assert again.strategy.hift.updates == 2 * LAYERS


def test_where_state_is_computed_on_in_place_a_failed_step_is_told_too(tmp_path):
    class Fails(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            self.calls = getattr(self, "calls", 0) + 1
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and self.calls == 2:
                        self.state[p]["seen"] = p.grad.clone()
                        raise ValueError("broken")

    trainer_ = trainer(callbacks=[ModelCheckpoint(tmp_path, save_on_exception=True)], enable_checkpointing=True)
    with (
        pytest.raises(ValueError, match="broken"),
        pytest.warns(UserWarning, match=r"`layers.1` was being updated: its optimizer state may have changed in part"),
    ):
        trainer_.fit(SmallTransformer(lambda parameters: Fails(parameters, lr=0.1)), loader(make_batches(2)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("update", UPDATES)
def test_inside_the_optimizer_the_last_parked_state_stays_and_touched_weights_are_named(device, update):
    def make(parameters):
        optimizer = FailsInStep(parameters, device)
        optimizer.fail_at = LAYERS + 1 if update == "block" else None
        return optimizer

    class Fails(SmallTransformer):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == LAYERS:
                state = self.trainer.optimizers[0].state_dict()["state"]
                self.parked = {i: {k: v.to("cpu", copy=True) for k, v in s.items()} for i, s in state.items()}
                self.weights = {name: p.detach().cpu().clone() for name, p in self.named_parameters()}
                optimizer.fail_at = optimizer.calls + 1 if update == "streamed" else optimizer.fail_at

    module = Fails(make)
    trainer_ = trainer(HiFTStrategy(update=update, window="6KiB"), accelerator=device.type, devices=1)
    with pytest.raises(torch.OutOfMemoryError, match=NAMED) as failure:
        trainer_.fit(module, loader(make_batches(2 * LAYERS)))
    device.no_cap()
    changed = [name for name, p in module.named_parameters() if not torch.equal(p, module.weights[name])]
    assert changed
    assert all(name in everything_told(failure.value) for name in changed)
    assert_same([trainer_.optimizers[0].state_dict()["state"]], [module.parked])
    assert trainer_.strategy.hift.updates == LAYERS


def test_fused_names_the_weights_it_has_touched_and_keeps_the_last_parked_state_of_the_others(device):
    class Fails(SmallTransformer):
        def on_before_backward(self, loss):
            if self.trainer.global_step == LAYERS:
                state = self.trainer.optimizers[0].state_dict()["state"]
                self.parked = {i: {k: v.to("cpu", copy=True) for k, v in s.items()} for i, s in state.items()}
                self.weights = {name: p.detach().cpu().clone() for name, p in self.named_parameters()}
                self.optimizer_to_fail.fail_at = self.optimizer_to_fail.calls + 2  # the second piece

    def make(parameters):
        module.optimizer_to_fail = FailsInStep(parameters, device)
        return module.optimizer_to_fail

    module = Fails(make)
    trainer_ = trainer(HiFTStrategy(update="fused", window="6KiB"), accelerator=device.type, devices=1)
    with pytest.raises(torch.OutOfMemoryError, match=NAMED) as failure:
        trainer_.fit(module, loader(make_batches(2 * LAYERS)))
    device.no_cap()
    changed = [name for name, p in module.named_parameters() if not torch.equal(p, module.weights[name])]
    assert len(changed) == 2
    assert all(name in everything_told(failure.value) for name in changed)
    state = trainer_.optimizers[0].state_dict()["state"]
    kept = [i for i in state if state[i]["step"] == module.parked[i]["step"]]
    assert len(kept) == len(state) - 1  # only the first piece's update was completed and parked
    assert_same([{i: state[i] for i in kept}], [{i: module.parked[i] for i in kept}])
    assert trainer_.strategy.hift.updates == LAYERS


@pytest.mark.parametrize("update", UPDATES)
def test_parking_needs_no_device_memory(device, update):
    capped, free = PlainLoop(device, update), PlainLoop(device, update)
    handle = capped.optimizer.register_step_post_hook(lambda *_: device.cap_here())  # before the engine's own hook
    with capped.hift, free.hift:
        for batch in make_batches(2 * LAYERS):
            capped.step(batch)
            device.no_cap()
            free.step(batch)
    handle.remove()
    assert_same(capped.snapshot(), free.snapshot())


def test_after_it_under_the_trainer_a_checkpoint_is_complete_and_fit_goes_on_from_it(device, tmp_path):
    class Fails(SmallTransformer):
        armed = True

        def on_before_backward(self, loss):
            if self.armed and self.trainer.global_step == FAILS_AT:
                device.cap_here()

    batches = make_batches(2 * LAYERS)
    module = Fails()
    trainer_ = trainer(HiFTStrategy(), accelerator=device.type, devices=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer_.fit(module, loader(batches))
    device.no_cap()
    trainer_.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["hift"]["engines"][0]["updates"] == FAILS_AT

    module.armed = False
    again = trainer(HiFTStrategy(), accelerator=device.type, devices=1, max_steps=2 * LAYERS, max_epochs=-1)
    smaller = [[tensor[:2] for tensor in batch] for batch in batches]
    again.fit(module, loader(smaller), ckpt_path=tmp_path / "after.ckpt")
    assert again.strategy.hift.updates == 2 * LAYERS


def test_under_a_cap_that_full_fine_tuning_exceeds_the_run_is_the_same(sim_device):
    free = SmallTransformer()
    trainer(HiFTStrategy(update="streamed"), accelerator="sim", devices=1).fit(free, loader(make_batches(2 * LAYERS)))
    weights = sum(p.nbytes for p in free.parameters())

    def capped(strategy):
        gc.collect()
        module = SmallTransformer()
        sim.set_memory_cap(sim.memory_allocated() + int(2.2 * weights) + 40_000)  # activations
        trainer(strategy, accelerator="sim", devices=1).fit(module, loader(make_batches(2 * LAYERS)))
        return module

    module = capped(HiFTStrategy(update="streamed"))
    assert module.losses == free.losses
    with pytest.raises(torch.OutOfMemoryError):
        capped(HiFTStrategy(offload="none", group_size=LAYERS))
