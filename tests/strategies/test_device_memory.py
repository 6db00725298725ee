"""What is on the device, at every moment of a step: counted by its allocator and by walking every live tensor."""

import gc
from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from hift_lightning import HiFTStrategy
from hift_lightning.engine.prefetch import StatePrefetch
from tests import simulated_accelerator as sim
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS


@pytest.fixture(autouse=True)
def nothing_stays_on_the_device(request):
    device = request.getfixturevalue("device" if "device" in request.fixturenames else "sim_device")
    gc.collect()
    before = device.allocated()
    yield
    gc.collect()
    assert device.allocated() == before


def fit(device, module, batches, strategy=None, callbacks=(), **arguments):
    trainer_ = trainer(
        strategy or HiFTStrategy(), accelerator=device.type, devices=1, callbacks=list(callbacks), **arguments
    )
    trainer_.fit(module, loader(batches))
    return trainer_


def live_on(device):
    """Every tensor on the device that Python can reach, gradients included."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == device.type:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor
    return list(found.values())


class Watch(Callback):
    """Notes, at each moment of a step, the device's bytes and the sizes of the live tensors that are no weights."""

    def __init__(self, device):
        self.device = device
        self.moments = []

    def note(self, name, module):
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        others = [t for t in live_on(self.device) if t.untyped_storage().data_ptr() not in weights]
        gradients = {n for n, p in module.named_parameters() if p.grad is not None}
        floats = sorted(t.numel() for t in others if t.is_floating_point() and t.dim() > 0)
        self.moments.append((name, self.device.allocated() - self.at_rest, gradients, floats))

    def on_train_start(self, trainer, pl_module):
        self.at_rest = self.with_weights = self.device.allocated()
        assert self.at_rest == self.before + self.device.bytes_of(pl_module.parameters())
        # registered before the engine's own hook, so it runs when state and gradients are there
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.note("step", pl_module))

    def setup(self, trainer, pl_module, stage):
        self.before = self.device.allocated()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at_rest = self.device.allocated() - self.device.bytes_of(batch)

    def on_after_backward(self, trainer, pl_module):
        self.note("backward", pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note("afterwards", pl_module)


@pytest.mark.parametrize(
    ("optimizer", "moments_per_weight", "group_size"),
    [("AdamW", 2, 1), ("AdamW", 2, 3), ("SGD with momentum", 1, 2), ("SGD", 0, 1), ("Adagrad", 1, 1)],
)
def test_only_the_active_block_has_gradients_and_state_on_the_device(device, optimizer, moments_per_weight, group_size):
    watch = Watch(device)
    strategy = HiFTStrategy(group_size=group_size)
    batches = make_batches(LAYERS + 2)
    trainer_ = fit(device, SmallTransformer(OPTIMIZERS[optimizer]), batches, strategy, [watch])
    blocks = strategy.hift.plan.blocks
    turns = [blocks[turn] for turn in reversed(range(len(blocks)))]
    parameters = dict(trainer_.lightning_module.named_parameters())
    batch = device.bytes_of(batches[0])
    for step in range(len(batches)):
        block = turns[step % len(turns)]
        own = sorted(parameters[name].numel() for name in block.parameters)
        block_bytes = device.bytes_of(parameters[name] for name in block.parameters)
        backward, in_step, afterwards = watch.moments[3 * step : 3 * step + 3]
        assert [backward[0], in_step[0], afterwards[0]] == ["backward", "step", "afterwards"]

        # the active block's own state may have been prefetched, where that did not raise the peak
        assert backward[2] == set(block.parameters)
        assert not Counter(own) - Counter(backward[3])
        assert not Counter(backward[3]) - Counter(own * (1 + moments_per_weight))
        prefetched = device.bytes_of(torch.empty(n) for n in (Counter(backward[3]) - Counter(own)).elements())
        assert 0 <= backward[1] - batch - block_bytes - prefetched <= device.scalars

        assert in_step[2] == set(block.parameters)
        assert in_step[3] == sorted(own * (1 + moments_per_weight))
        assert 0 <= in_step[1] - batch - block_bytes * (1 + moments_per_weight) <= device.scalars

        assert afterwards[2] == set()
        assert afterwards[3] == []
        assert 0 <= afterwards[1] - batch <= device.scalars


def test_the_full_strategy_would_not_pass(device):
    """The same watch sees the state of all layers stay on the device without HiFT."""
    watch = Watch(device)
    module = SmallTransformer()
    fit(device, module, make_batches(1), SingleDeviceStrategy(f"{device.type}:0"), [watch])
    assert watch.moments[-1][1] >= 2 * device.bytes_of(module.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_run_on_the_cpu_exactly(sim_device, name):
    batches = make_batches(3 * LAYERS)
    on_sim, on_cpu = SmallTransformer(OPTIMIZERS[name]), SmallTransformer(OPTIMIZERS[name])
    fit(sim_device, on_sim, batches, gradient_clip_val=0.5, accumulate_grad_batches=3 if name == "AdamW" else 1)
    trainer(gradient_clip_val=0.5, accumulate_grad_batches=3 if name == "AdamW" else 1).fit(on_cpu, loader(batches))
    assert on_sim.losses == on_cpu.losses
    for left, right in zip(on_sim.parameters(), on_cpu.parameters(), strict=True):
        assert left.device.type == "cpu"
        assert torch.equal(left, right)


def test_bytes_moved_are_the_active_blocks_state_and_the_batch(sim_device):
    class Meter(Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.steps.append((sim.host_to_device_bytes(), sim.device_to_host_bytes()))
            sim.reset_copy_counters()

    meter = Meter()
    strategy = HiFTStrategy()
    batches = make_batches(3 * LAYERS)
    fit(sim_device, SmallTransformer(), batches, strategy, [meter])
    batch = sim_device.bytes_of(batches[0])
    turns = list(reversed(strategy.hift.plan.blocks)) * 3
    for step, block in enumerate(turns):
        if step == 0:
            continue  # the model came to the device before it
        state = 2 * block.nbytes
        first_visit = step < LAYERS
        assert meter.steps[step] == (batch + (0 if first_visit else state), state)
    assert strategy.hift.residency.bytes_parked == sum(2 * block.nbytes for block in turns)


def test_adagrad_never_has_all_its_state_on_the_device(device):
    module = SmallTransformer(OPTIMIZERS["Adagrad"])
    weights = device.bytes_of(module.parameters())
    device.reset_peak()
    start = device.allocated()

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            self.peak = device.peak() - start

    at_start = AtStart()
    fit(device, module, make_batches(1), callbacks=[at_start])
    assert weights <= at_start.peak <= weights + device.scalars


def test_after_fit_nothing_is_on_the_device_and_a_checkpoint_is_complete(device, tmp_path):
    start = device.allocated()
    module = SmallTransformer()
    trainer_ = fit(device, module, make_batches(LAYERS))
    gc.collect()
    assert device.allocated() == start
    assert live_on(device) == []
    trainer_.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) == len(list(module.parameters()))
    for state in saved["optimizer_states"][0]["state"].values():
        assert all(value.device.type == "cpu" for value in state.values())


def test_after_an_exception_nothing_of_the_model_is_on_the_device(device):
    start = device.allocated()

    class Stops(SmallTransformer):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == LAYERS:
                raise RuntimeError("stop")

    module = Stops()
    with pytest.raises(RuntimeError, match="stop"):
        fit(device, module, make_batches(2 * LAYERS))
    gc.collect()
    # Lightning itself holds on to the batch, in the results of the step that failed
    assert device.allocated() - start <= device.bytes_of(make_batches(1)[0])
    module.trainer.fit_loop.epoch_loop._results.batch = None


def test_resuming_puts_no_parked_state_on_the_device(device, tmp_path):
    stopped = fit(device, SmallTransformer(), make_batches(LAYERS))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    module = SmallTransformer()
    weights = device.bytes_of(module.parameters())
    start = device.allocated()

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            self.peak = device.peak() - start

    at_start = AtStart()
    device.reset_peak()
    trainer_ = trainer(HiFTStrategy(), accelerator=device.type, devices=1, max_epochs=2, callbacks=[at_start])
    trainer_.fit(module, loader(make_batches(LAYERS)), ckpt_path=tmp_path / "stopped.ckpt")
    assert weights <= at_start.peak <= weights + device.scalars

    straight = SmallTransformer()
    fit(device, straight, make_batches(LAYERS), max_epochs=2)
    for left, right in zip(module.parameters(), straight.parameters(), strict=True):
        assert torch.equal(left, right)


def test_host_buffers_are_pinned_and_allocated_once(device):
    class Buffers(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state
            self.seen.append({value.data_ptr() for s in state.values() for k, value in s.items() if k != "step"})
            assert all(value.is_pinned() for s in state.values() for k, value in s.items() if k != "step")

    buffers = Buffers()
    fit(device, SmallTransformer(), make_batches(3 * LAYERS), callbacks=[buffers])
    assert buffers.seen[LAYERS - 1] == buffers.seen[-1]


def test_offload_none_keeps_state_on_the_device(device):
    watch = Watch(device)
    module = SmallTransformer()
    fit(device, module, make_batches(LAYERS), HiFTStrategy(offload="none"), [watch])
    state = watch.moments[-1][1] + watch.at_rest - watch.with_weights
    batch = device.bytes_of(make_batches(1)[0])
    assert 0 <= state - 2 * device.bytes_of(module.parameters()) <= device.scalars + batch


def test_state_is_prefetched_in_backward_only_where_the_peak_stays_as_it_is(device):
    class Peaks(SmallTransformer):
        def on_train_start(self):
            self.prefetched, self.peaks = [], []
            device.reset_peak()

        def on_after_backward(self):
            residency = self.trainer.strategy.hift.residency
            here = [residency.state_bytes(p) for p in self.parameters() if p.grad is not None]
            there = [p for p in self.parameters() if p.grad is not None and not residency.is_parked(p)]
            self.prefetched.append(len(there) if all(here) else 0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.peaks.append(device.peak())

    def peaks_of(prefetches, monkeypatch):
        if not prefetches:
            monkeypatch.setattr(StatePrefetch, "page_in", lambda self, parameter: None)
        module = Peaks(depth=4)
        fit(device, module, make_batches(3 * 6, size=64), HiFTStrategy(order="bottom2up"))
        return module

    with pytest.MonkeyPatch.context() as monkeypatch:
        without = peaks_of(False, monkeypatch)
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = peaks_of(True, monkeypatch)
    assert sum(without.prefetched) == 0
    assert sum(module.prefetched) > 12  # tensors whose state came while backward went on
    # the engine counts a tensor's own bytes, and a block has at most 12 tensors of two moments and a gradient each
    rounded = (device.rounding - 1) * 3 * 12
    assert all(there <= here <= there + rounded for here, there in zip(module.peaks, without.peaks, strict=True))
    assert module.losses == without.losses


def test_nothing_is_prefetched_for_micro_batches_that_others_follow(device):
    class Watches(SmallTransformer):
        def on_after_backward(self):
            if self.trainer.fit_loop._should_accumulate():
                residency = self.trainer.strategy.hift.residency
                assert all(residency.is_parked(p) for p in self.parameters() if residency.state_bytes(p))

    fit(device, Watches(), make_batches(3 * 3 * LAYERS), accumulate_grad_batches=3)
