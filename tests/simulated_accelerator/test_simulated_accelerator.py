"""The simulated accelerator counts what it should, and computes what the CPU computes."""

import gc
import logging

import lightning as L
import pytest
import torch
import torch.utils.checkpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tests import simulated_accelerator as sim

MISSING = sim.compiler_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

VOCABULARY = 64


@pytest.fixture(autouse=True)
def nothing_left_on_the_device():
    sim.load()
    if sim.memory_allocated():
        gc.collect()
    before = sim.memory_allocated()
    sim.reset_peak_memory_stats()
    sim.reset_copy_counters()
    yield
    sim.set_memory_cap(None)
    if sim.memory_allocated() != before:
        gc.collect()
    assert sim.memory_allocated() == before


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.15,
        attention_probs_dropout_prob=0.15,
    )
    return BertForSequenceClassification(config)


class Finetuning(L.LightningModule):
    def __init__(self, model: torch.nn.Module, make_optimizer) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer = make_optimizer
        self.losses: list[float] = []

    def training_step(self, batch, batch_index):
        ids, labels = batch
        loss = self.model(input_ids=ids, labels=labels).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(make_model, on_device: bool, make_optimizer=adamw, precision="32-true", plugins=None, **model_switches):
    """Three steps under `Trainer`; returns the losses and the weights they leave."""
    torch.manual_seed(0)
    model = make_model()
    model.train()
    if model_switches.get("activation_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, VOCABULARY, (6, 8))
    labels = ids if make_model is llama else torch.randint(0, 2, (6,))
    module = Finetuning(model, make_optimizer)
    trainer = L.Trainer(
        accelerator=sim.SimulatedAccelerator() if on_device else "cpu",
        devices=1,
        strategy=SingleDeviceStrategy(device="sim:0" if on_device else "cpu"),
        precision=precision,
        plugins=plugins,
        max_steps=3,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(TensorDataset(ids, labels), batch_size=2))
    return module.losses, {name: tensor.cpu() for name, tensor in module.state_dict().items()}


def assert_same_training(on_cpu, on_device) -> None:
    assert on_cpu[0] == on_device[0]
    assert len(on_cpu[0]) == 3
    torch.testing.assert_close(on_cpu[1], on_device[1], rtol=0, atol=0)


# ---- memory ----


def test_allocation_free_and_peak_are_counted_to_the_byte():
    start = sim.memory_allocated()
    first = torch.empty(1000, device="sim")
    second = torch.zeros(3, dtype=torch.int64, device="sim")
    assert sim.memory_allocated() == start + 4000 + 24
    del first
    assert sim.memory_allocated() == start + 24
    assert sim.max_memory_allocated() == start + 4024
    sim.reset_peak_memory_stats()
    assert sim.max_memory_allocated() == start + 24
    del second


def test_what_a_kernel_allocates_for_itself_counts_while_it_runs():
    start = sim.memory_allocated()
    x = torch.randn(1000, device="sim")
    sim.reset_peak_memory_stats()
    values, indices = x.sort()
    assert sim.memory_allocated() == start + 4000 + 4000 + 8000
    del values, indices
    x.softmax(0).sum()
    assert sim.memory_allocated() == start + 4000
    (x + 1).mul(2)
    assert sim.max_memory_allocated() >= start + 3 * 4000


def test_memory_of_the_cpu_is_not_counted():
    start = sim.memory_allocated()
    on_cpu = torch.randn(1000)
    from_device = torch.randn(1000, device="sim").cpu()
    assert sim.memory_allocated() == start
    assert on_cpu.device == from_device.device == torch.device("cpu")


def test_views_share_memory_and_allocate_nothing():
    x = torch.arange(12.0, device="sim")
    before = sim.memory_allocated()
    views = [
        x.view(3, 4),
        x[2:5],
        x.view(3, 4).t(),
        x.expand(5, 12),
        x.detach(),
        x.as_strided((2, 2), (1, 2)),
        x.unfold(0, 3, 1),
    ]
    views += x.chunk(3)
    assert sim.memory_allocated() == before
    assert all(view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for view in views)
    views[0].zero_()
    assert x.cpu().count_nonzero() == 0


def test_out_variants_and_resizing_write_to_the_device_tensor():
    start = sim.memory_allocated()
    x = torch.ones(10, device="sim")
    out = torch.empty(0, device="sim")
    torch.add(x, 1, out=out)
    assert out.tolist() == [2.0] * 10
    assert sim.memory_allocated() == start + 80
    out.resize_(100)
    assert out[:10].tolist() == [2.0] * 10
    out.untyped_storage().resize_(0)
    assert sim.memory_allocated() == start + 40
    out.set_(x)
    out.add_(1)
    assert x.tolist() == [2.0] * 10


def test_in_place_changes_of_shape_reach_the_device_tensor():
    x = torch.arange(6.0, device="sim").view(1, 2, 3)
    x.squeeze_(0).t_()
    assert x.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_cap_raises_out_of_memory_and_leaves_memory_as_it_was():
    x = torch.ones(100, device="sim")
    before = sim.memory_allocated()
    sim.set_memory_cap(before + 400)
    fits = x.neg()
    with pytest.raises(torch.OutOfMemoryError, match="400 bytes"):
        fits.neg()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, device="sim")
    del fits
    assert sim.memory_allocated() == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.linalg.qr(x.view(10, 10))  # allocates several tensors, one after the other
    assert sim.memory_allocated() == before
    assert x.tolist() == [1.0] * 100


def test_out_of_memory_in_backward_reaches_the_caller():
    x = torch.ones(100, device="sim", requires_grad=True)
    y = x.exp().sum()
    sim.set_memory_cap(sim.memory_allocated())
    with pytest.raises(torch.OutOfMemoryError):
        y.backward()
    assert x.grad is None


# ---- copies, streams, pinned memory ----


def test_explicit_copies_are_counted_by_direction_and_scalars_apart():
    on_cpu = torch.ones(10, 10)
    on_device = on_cpu.to("sim")
    half = torch.empty(10, 10, dtype=torch.float16, device="sim").copy_(on_cpu)
    assert sim.host_to_device_bytes() == 400 + 200
    assert sim.device_to_host_bytes() == 0
    on_device.copy_(half)
    on_device[:, :3].cpu()
    assert sim.device_to_host_bytes() == 120
    assert on_device.sum().item() == 100
    assert sim.scalars_read() == 1
    assert (sim.host_to_device_bytes(), sim.device_to_host_bytes()) == (600, 120)
    sim.reset_copy_counters()
    assert (sim.host_to_device_bytes(), sim.device_to_host_bytes(), sim.scalars_read()) == (0, 0, 0)


def test_mixing_devices_raises_except_for_scalars_and_indices():
    x = torch.ones(3, device="sim")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).tolist() == [2.0] * 3
    assert x[torch.tensor([0, 2])].tolist() == [1.0] * 2
    assert sim.host_to_device_bytes() == 16


def test_pinned_memory_is_pinned_and_not_the_devices():
    start, pinned = sim.memory_allocated(), sim.pinned_memory_allocated()
    buffer = torch.empty(100, pin_memory=True)
    assert buffer.is_pinned()
    assert buffer[10:].is_pinned()
    assert torch.ones(3).pin_memory().is_pinned()
    assert not torch.ones(3).is_pinned()
    assert sim.pinned_memory_allocated() == pinned + 512  # the next power of two, as CUDA's allocator takes
    assert sim.memory_allocated() == start
    del buffer
    assert sim.pinned_memory_allocated() == pinned


def test_prefetch_code_written_for_cuda_runs():
    module = torch.get_device_module("sim")
    host = torch.arange(4.0).pin_memory()
    device = torch.empty(4, device="sim")
    side, main = module.Stream(), module.current_stream()
    started, done = module.Event(enable_timing=True), module.Event(enable_timing=True)
    started.record()
    side.wait_stream(main)
    with module.stream(side):
        assert module.current_stream() == side
        device.copy_(host, non_blocking=True)
        done.record()
    assert module.current_stream() == main == module.default_stream()
    main.wait_event(done)
    done.wait()
    device.record_stream(main)
    done.synchronize()
    module.synchronize()
    assert done.query()
    assert started.elapsed_time(done) >= 0
    assert device.tolist() == [0.0, 1.0, 2.0, 3.0]


# ---- numbers ----


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("make_model", [llama, bert])
def test_transformers_train_under_lightning_as_on_the_cpu(make_model, activation_checkpointing):
    runs = [
        train(make_model, on_device, activation_checkpointing=activation_checkpointing) for on_device in (False, True)
    ]
    assert_same_training(*runs)


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "Adafactor", "RMSprop", "NAdam"])
def test_optimizers_step_as_on_the_cpu(name):
    def make_optimizer(parameters):
        # torch takes the foreach implementation on accelerators by default, and NAdam's rounds differently
        return getattr(torch.optim, name)(parameters, lr=1e-2, foreach=True)

    assert_same_training(*(train(bert, on_device, make_optimizer) for on_device in (False, True)))


def test_convolutions_train_as_on_the_cpu():
    def run(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.MaxPool2d(2))
        images = torch.randn(2, 3, 8, 8)
        net.to(device)(images.to(device)).square().sum().backward()
        return [parameter.grad.cpu() for parameter in net.parameters()]

    torch.testing.assert_close(run("sim"), run("cpu"), rtol=0, atol=0)


def test_half_precision_weights_train_as_on_the_cpu():
    assert_same_training(*(train(bert, on_device, precision="bf16-true") for on_device in (False, True)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_casts_on_the_device(precision):
    in_full, mixed = train(llama, True), train(llama, True, precision=precision)
    assert mixed[0] != in_full[0]
    assert mixed[0] == pytest.approx(in_full[0], abs=1e-2)


def test_float16_overflow_skips_the_step():
    scaler = torch.amp.GradScaler("sim", init_scale=2.0**60)
    losses, _ = train(llama, True, precision=None, plugins=MixedPrecision("16-mixed", "sim", scaler))
    assert scaler.get_scale() == 2.0**57
    assert len(losses) == 3


@pytest.mark.parametrize("masked", [False, True])
def test_attention_takes_the_cpus_fused_kernel(masked):
    query = torch.randn(2, 4, 8, 16, device="sim", requires_grad=True)
    mask = torch.ones(8, 8, dtype=torch.bool, device="sim").tril() if masked else None
    output = torch.nn.functional.scaled_dot_product_attention(query, query, query, mask)
    assert "FlashAttentionForCpu" in type(output.grad_fn).__name__
    on_cpu = query.detach().cpu()
    expected = torch.nn.functional.scaled_dot_product_attention(
        on_cpu, on_cpu, on_cpu, mask if mask is None else mask.cpu()
    )
    assert torch.equal(output.cpu(), expected)


def test_random_numbers_and_their_state_are_the_cpus():
    torch.manual_seed(3)
    expected = torch.randn(5), torch.randperm(5)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(5, device="sim").cpu(), expected[0])
    state = torch.sim.get_rng_state()
    assert torch.equal(torch.randperm(5, device="sim").cpu(), expected[1])
    torch.sim.set_rng_state(state)
    assert torch.equal(torch.randperm(5, device="sim").cpu(), expected[1])


def test_saved_tensor_hooks_see_device_tensors():
    x = torch.randn(10, device="sim", requires_grad=True)
    before = sim.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu(), lambda t: t.to("sim")):
        y = x.exp()
    del y
    assert sim.memory_allocated() == before
    assert sim.device_to_host_bytes() == 40


def test_a_step_leaves_weights_gradients_and_optimizer_state():
    start = sim.memory_allocated()
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(16))).to("sim")
    weights = 16 * (32 * 32 + 32) * 4
    assert sim.memory_allocated() == start + weights
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        sim.reset_peak_memory_stats()
        model(torch.ones(4, 32, device="sim")).sum().backward()
        optimizer.step()
        # the foreach implementation holds the denominators of all parameters at once, a fifth copy; the CPU's
        # kernels keep a scalar operand in a tensor of 4 bytes
        assert sim.max_memory_allocated() == start + 5 * weights + 4
        optimizer.zero_grad()
        assert sim.memory_allocated() == start + 3 * weights
    del model, optimizer
    assert sim.memory_allocated() == start


# ---- the rest of the process ----


def test_forked_data_loader_workers_and_pinning_work():
    loader = DataLoader(
        TensorDataset(torch.arange(8.0)), batch_size=4, num_workers=1, multiprocessing_context="fork", pin_memory=True
    )
    batches = [batch for (batch,) in loader]
    assert all(batch.is_pinned() for batch in batches)
    assert torch.cat(batches).tolist() == list(range(8))


def _backward_in_child(queue) -> None:
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    queue.put(x.grad.tolist())


def test_forked_processes_can_run_backward():
    torch.ones(3, device="sim", requires_grad=True).sum().backward()
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_backward_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == [2.0] * 3
    child.join()
    assert child.exitcode == 0


def test_backward_follows_a_change_of_the_number_of_threads():
    threads = torch.get_num_threads()
    seen = []
    x = torch.ones(3, device="sim", requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append((gradient * 1, torch.get_num_threads())[1]))
    try:
        torch.set_num_threads(threads + 1)
        y.sum().backward()
    finally:
        torch.set_num_threads(threads)
    assert seen == [threads + 1]


def test_random_state_and_checkpointing_of_the_cpu_are_as_before():
    torch.manual_seed(5)
    with torch.random.fork_rng():
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3))

    torch.manual_seed(5)
    expected = torch.nn.functional.dropout(torch.ones(50), 0.5)
    torch.manual_seed(5)
    x = torch.ones(50, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(torch.nn.functional.dropout, x, 0.5, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, expected)


def test_fake_tensors_of_the_device_take_no_memory():
    before = sim.memory_allocated()
    with FakeTensorMode(), torch.device("sim"):
        model = llama()
        ids = torch.zeros(2, 8, dtype=torch.int64)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad.device == torch.device("sim", 0) for parameter in model.parameters())
        assert sim.memory_allocated() == before


def test_swapping_keeps_ties_and_parameter_objects():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        model[1].weight = model[0].weight
        parameter = model[0].weight
        model.to("sim")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight is model[1].weight is parameter
    assert parameter.device.type == "sim"


def test_devices_other_than_one_are_refused():
    with pytest.raises(ValueError, match="devices=2"):
        L.Trainer(accelerator="sim", devices=2, logger=False)


@pytest.fixture(autouse=True)
def quiet_lightning(caplog):
    caplog.set_level(logging.ERROR, "lightning.pytorch")
