"""What is on the device, at every moment of a step: counted by its allocator and by walking every live tensor."""

import gc
from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from hift_lightning import HiFT, HiFTStrategy
from tests import simulated_accelerator as sim
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS

pytestmark = pytest.mark.skipif(sim.compiler_missing() is not None, reason=str(sim.compiler_missing()))

SCALARS = 256
"""Bytes that a loss, a norm and the like may take on the device."""


@pytest.fixture(autouse=True)
def device():
    sim.load()
    gc.collect()
    before = sim.memory_allocated()
    yield
    gc.collect()
    assert sim.memory_allocated() == before


def fit(module, batches, strategy=None, callbacks=(), **arguments):
    trainer_ = trainer(strategy or HiFTStrategy(), accelerator="sim", devices=1, callbacks=list(callbacks), **arguments)
    trainer_.fit(module, loader(batches))
    return trainer_


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def live_on_device():
    """Every tensor on the device that Python can reach, gradients included."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "sim":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor
    return list(found.values())


class Watch(Callback):
    """Notes, at each moment of a step, the device's bytes and the sizes of the live tensors that are no weights."""

    def __init__(self):
        self.moments = []

    def note(self, name, module):
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        others = [t for t in live_on_device() if t.untyped_storage().data_ptr() not in weights]
        gradients = {n for n, p in module.named_parameters() if p.grad is not None}
        floats = sorted(t.numel() for t in others if t.is_floating_point() and t.dim() > 0)
        self.moments.append((name, sim.memory_allocated() - self.at_rest, gradients, floats))

    def on_train_start(self, trainer, pl_module):
        self.at_rest = self.with_weights = sim.memory_allocated()
        assert self.at_rest == self.before + bytes_of(pl_module.parameters())
        # registered before the engine's own hook, so it runs when state and gradients are there
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.note("step", pl_module))

    def setup(self, trainer, pl_module, stage):
        self.before = sim.memory_allocated()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at_rest = sim.memory_allocated() - bytes_of(batch)

    def on_after_backward(self, trainer, pl_module):
        self.note("backward", pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note("afterwards", pl_module)


@pytest.mark.parametrize(
    ("optimizer", "moments_per_weight", "group_size"),
    [("AdamW", 2, 1), ("AdamW", 2, 3), ("SGD with momentum", 1, 2), ("SGD", 0, 1), ("Adagrad", 1, 1)],
)
def test_only_the_active_block_has_gradients_and_state_on_the_device(optimizer, moments_per_weight, group_size):
    watch = Watch()
    strategy = HiFTStrategy(group_size=group_size)
    batches = make_batches(LAYERS + 2)
    trainer_ = fit(SmallTransformer(OPTIMIZERS[optimizer]), batches, strategy, [watch])
    blocks = strategy.hift.plan.blocks
    turns = [blocks[turn] for turn in reversed(range(len(blocks)))]
    sizes = {name: p.numel() for name, p in trainer_.lightning_module.named_parameters()}
    batch = bytes_of(batches[0])
    for step in range(len(batches)):
        block = turns[step % len(turns)]
        own = sorted(sizes[name] for name in block.parameters)
        backward, in_step, afterwards = watch.moments[3 * step : 3 * step + 3]
        assert [backward[0], in_step[0], afterwards[0]] == ["backward", "step", "afterwards"]

        # the active block's own state may have been prefetched, where that did not raise the peak
        assert backward[2] == set(block.parameters)
        assert not Counter(own) - Counter(backward[3])
        assert not Counter(backward[3]) - Counter(own * (1 + moments_per_weight))
        prefetched = 4 * (sum(backward[3]) - sum(own))
        assert 0 <= backward[1] - batch - block.nbytes - prefetched <= SCALARS

        assert in_step[2] == set(block.parameters)
        assert in_step[3] == sorted(own * (1 + moments_per_weight))
        assert 0 <= in_step[1] - batch - block.nbytes * (1 + moments_per_weight) <= SCALARS

        assert afterwards[2] == set()
        assert afterwards[3] == []
        assert 0 <= afterwards[1] - batch <= SCALARS


def test_the_full_strategy_would_not_pass():
    """The same watch sees the state of all layers stay on the device without HiFT."""
    watch = Watch()
    module = SmallTransformer()
    fit(module, make_batches(1), SingleDeviceStrategy("sim:0"), [watch])
    assert watch.moments[-1][1] >= 2 * bytes_of(module.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_run_on_the_cpu_exactly(name):
    batches = make_batches(3 * LAYERS)
    on_sim, on_cpu = SmallTransformer(OPTIMIZERS[name]), SmallTransformer(OPTIMIZERS[name])
    fit(on_sim, batches, gradient_clip_val=0.5, accumulate_grad_batches=3 if name == "AdamW" else 1)
    trainer(gradient_clip_val=0.5, accumulate_grad_batches=3 if name == "AdamW" else 1).fit(on_cpu, loader(batches))
    assert on_sim.losses == on_cpu.losses
    for left, right in zip(on_sim.parameters(), on_cpu.parameters(), strict=True):
        assert left.device.type == "cpu"
        assert torch.equal(left, right)


def test_bytes_moved_are_the_active_blocks_state_and_the_batch():
    class Meter(Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.steps.append((sim.host_to_device_bytes(), sim.device_to_host_bytes()))
            sim.reset_copy_counters()

    meter = Meter()
    strategy = HiFTStrategy()
    batches = make_batches(3 * LAYERS)
    fit(SmallTransformer(), batches, strategy, [meter])
    batch = bytes_of(batches[0])
    turns = list(reversed(strategy.hift.plan.blocks)) * 3
    for step, block in enumerate(turns):
        if step == 0:
            continue  # the model came to the device before it
        state = 2 * block.nbytes
        first_visit = step < LAYERS
        assert meter.steps[step] == (batch + (0 if first_visit else state), state)
    assert strategy.hift.residency.bytes_parked == sum(2 * block.nbytes for block in turns)


def test_adagrad_never_has_all_its_state_on_the_device():
    module = SmallTransformer(OPTIMIZERS["Adagrad"])
    weights = bytes_of(module.parameters())
    sim.reset_peak_memory_stats()
    start = sim.memory_allocated()

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            self.peak = sim.max_memory_allocated() - start

    at_start = AtStart()
    fit(module, make_batches(1), callbacks=[at_start])
    assert weights <= at_start.peak <= weights + SCALARS


def test_after_fit_nothing_is_on_the_device_and_a_checkpoint_is_complete(tmp_path):
    start = sim.memory_allocated()
    module = SmallTransformer()
    trainer_ = fit(module, make_batches(LAYERS))
    gc.collect()
    assert sim.memory_allocated() == start
    assert live_on_device() == []
    trainer_.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) == len(list(module.parameters()))
    for state in saved["optimizer_states"][0]["state"].values():
        assert all(value.device.type == "cpu" for value in state.values())


def test_after_an_exception_nothing_of_the_model_is_on_the_device():
    start = sim.memory_allocated()

    class Stops(SmallTransformer):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == LAYERS:
                raise RuntimeError("stop")

    module = Stops()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, make_batches(2 * LAYERS))
    gc.collect()
    # Lightning itself holds on to the batch, in the results of the step that failed
    assert sim.memory_allocated() - start <= bytes_of(make_batches(1)[0])
    module.trainer.fit_loop.epoch_loop._results.batch = None


def test_resuming_puts_no_parked_state_on_the_device(tmp_path):
    stopped = fit(SmallTransformer(), make_batches(LAYERS))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    module = SmallTransformer()
    weights = bytes_of(module.parameters())
    start = sim.memory_allocated()

    class AtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            self.peak = sim.max_memory_allocated() - start

    at_start = AtStart()
    sim.reset_peak_memory_stats()
    trainer_ = trainer(HiFTStrategy(), accelerator="sim", devices=1, max_epochs=2, callbacks=[at_start])
    trainer_.fit(module, loader(make_batches(LAYERS)), ckpt_path=tmp_path / "stopped.ckpt")
    assert weights <= at_start.peak <= weights + SCALARS

    straight = SmallTransformer()
    fit(straight, make_batches(LAYERS), max_epochs=2)
    for left, right in zip(module.parameters(), straight.parameters(), strict=True):
        assert torch.equal(left, right)


def test_host_buffers_are_pinned_and_allocated_once():
    class Buffers(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state
            self.seen.append({value.data_ptr() for s in state.values() for k, value in s.items() if k != "step"})
            assert all(value.is_pinned() for s in state.values() for k, value in s.items() if k != "step")

    buffers = Buffers()
    fit(SmallTransformer(), make_batches(3 * LAYERS), callbacks=[buffers])
    assert buffers.seen[LAYERS - 1] == buffers.seen[-1]


def test_offload_none_keeps_state_on_the_device():
    watch = Watch()
    module = SmallTransformer()
    fit(module, make_batches(LAYERS), HiFTStrategy(offload="none"), [watch])
    state = watch.moments[-1][1] + watch.at_rest - watch.with_weights
    assert 0 <= state - 2 * bytes_of(module.parameters()) <= SCALARS + bytes_of(make_batches(1)[0])


def test_state_is_prefetched_in_backward_only_where_the_peak_stays_as_it_is():
    class Peaks(SmallTransformer):
        def on_train_start(self):
            self.prefetched, self.peaks = [], []
            sim.reset_peak_memory_stats()

        def on_after_backward(self):
            residency = self.trainer.strategy.hift.residency
            here = [residency.state_bytes(p) for p in self.parameters() if p.grad is not None]
            there = [p for p in self.parameters() if p.grad is not None and not residency.is_parked(p)]
            self.prefetched.append(len(there) if all(here) else 0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.peaks.append(sim.max_memory_allocated())

    def peaks_of(prefetches, monkeypatch):
        if not prefetches:
            monkeypatch.setattr(HiFT, "_prefetch_in_backward", lambda self, parameter: None)
        module = Peaks(depth=4)
        fit(module, make_batches(3 * 6, size=64), HiFTStrategy(order="bottom2up"))
        return module

    with pytest.MonkeyPatch.context() as monkeypatch:
        without = peaks_of(False, monkeypatch)
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = peaks_of(True, monkeypatch)
    assert sum(without.prefetched) == 0
    assert sum(module.prefetched) > 12  # tensors whose state came while backward went on
    assert module.peaks == without.peaks
    assert module.losses == without.losses


def test_nothing_is_prefetched_for_micro_batches_that_others_follow():
    class Watches(SmallTransformer):
        def on_after_backward(self):
            if self.trainer.fit_loop._should_accumulate():
                residency = self.trainer.strategy.hift.residency
                assert all(residency.is_parked(p) for p in self.parameters() if residency.state_bytes(p))

    fit(Watches(), make_batches(3 * 3 * LAYERS), accumulate_grad_batches=3)
