"""NaN and inf in a plain loop: found before the optimizer uses them, whatever the gradients are like."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from hift_lightning import HiFT, HiFTSettings
from hift_lightning.engine.conversion import parameters_stay_themselves
from hift_lightning.engine.errors import ConfigurationError, NonfiniteError
from hift_lightning.engine.nonfinite import NonfiniteSearch
from tests.reference_loop import reference_loop, turns_of
from tests.small_transformer import LAYERS, SmallTransformer, make_batches

LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "inf")])
def test_one_number_among_many_is_found_in_any_dtype(dtype, value, kind):
    tensors = [torch.full((5, 7), LARGEST[dtype], dtype=dtype) for _ in range(4)]
    search = NonfiniteSearch()
    for i, tensor in enumerate(tensors):
        search.look_at(str(i), tensor)
    assert search.first() is None  # the largest numbers do not overflow
    tensors[2][3, 1] = value
    tensors[3][0, 0] = math.nan
    for i, tensor in enumerate(tensors):
        search.look_at(str(i), tensor)
    assert search.first() == ("2", kind)
    assert search.first() is None  # nothing has been looked at since


@pytest.mark.parametrize("broken", [False, True])
def test_sparse_complex_empty_and_mixed_gradients_are_looked_at(broken):
    value = math.inf if broken else 1.0
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), torch.tensor([1.0, 2.0, value]), (4,))
    unbroken = [torch.empty(0), torch.tensor(1.0, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)]
    for tensor in (sparse, torch.tensor([1.0, complex(0, value)])):
        search = NonfiniteSearch()
        for i, other in enumerate(unbroken):
            search.look_at(str(i), other)
        search.look_at("this", tensor)
        assert search.first() == (("this", "inf") if broken else None)


def test_what_is_no_policy_is_refused():
    with pytest.raises(ConfigurationError, match=r"`nonfinite='ignore'`.*raise, skip"):
        HiFTSettings(nonfinite="ignore")


def test_skipping_is_refused_where_gradients_are_used_before_all_are_there():
    with pytest.raises(ConfigurationError, match=r"`nonfinite='skip'`.*`update='streamed'`"):
        HiFTSettings(nonfinite="skip", update="fused")


class Loop:
    """A plain loop on a device that multiplies the loss of the batches named by NaN or inf."""

    def __init__(self, device="cpu", spikes=(), value=math.nan, make_optimizer=None, **settings):
        self.spikes, self.value = spikes, value
        self.device = device
        self.model = SmallTransformer()
        with parameters_stay_themselves(torch.device(device)):
            self.model.to(device)
        make_optimizer = make_optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=False))
        self.optimizer = make_optimizer(self.model.parameters())
        self.hift = HiFT(self.model, self.optimizer, HiFTSettings(window="6KiB", **settings))

    def loss(self, i, batch):
        loss = self.model.loss([tensor.to(self.device) for tensor in batch])
        return loss * self.value if i in self.spikes else loss

    def run(self, batches, accumulate=1, tell=False, scheduler=None):
        with self.hift:
            for i, batch in enumerate(batches):
                loss = self.loss(i, batch) / accumulate
                loss.backward()
                if tell:
                    self.hift.after_backward(loss)
                if (i + 1) % accumulate == 0:
                    self.optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
        return self

    def snapshot(self):
        self.hift.residency.synchronize()
        state = self.optimizer.state_dict()["state"]
        masters = self.hift.state_dict()["masters"]
        return {
            **{name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()},
            **{f"{i}.{key}": value.clone() for i, leaves in state.items() for key, value in leaves.items()},
            **{f"master of {name}": value.clone() for name, value in masters.items()},
        }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.filterwarnings("ignore:A step is left out")
@pytest.mark.parametrize("tell", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("update", ["block", "streamed"])
@pytest.mark.parametrize("device_type", ["cpu", "sim"])
def test_with_a_spike_in_every_third_step_it_is_the_run_without_those_steps(device_type, update, value, tell, request):
    if device_type == "sim":
        request.getfixturevalue("sim_device")
    batches = make_batches(6 * LAYERS)
    spikes = range(1, len(batches), 3)
    loop = Loop(device_type, spikes, value, update=update, nonfinite="skip").run(batches, tell=tell)
    kept = [batch for i, batch in enumerate(batches) if i not in spikes]
    assert_same(loop.snapshot(), Loop(device_type, update=update).run(kept).snapshot())
    assert loop.hift.updates == len(kept)
    assert loop.hift.skipped_steps == len(spikes) == 8
    assert loop.hift.cycle == 4
    assert all(p.grad is None for p in loop.model.parameters())


@pytest.mark.filterwarnings("ignore:A step is left out")
@pytest.mark.parametrize("tell", [False, True])
def test_skipping_equals_the_reference_loop_with_accumulation_and_a_delayed_rate(tell):
    accumulate, lr_decay = 2, 0.7
    batches = make_batches(4 * LAYERS * accumulate)
    spikes = (0, 7, 9, 20, 21)  # of windows 0, 3, 4 and 10: in the first micro-batch, in the second, and in both
    broken = {i // accumulate for i in spikes}
    loop = Loop(spikes=spikes, order="random", seed=3, nonfinite="skip", lr_update="cycle_once")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, lr_decay)
    loop.run(batches, accumulate, tell, loop.hift.delay(scheduler))

    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    blocks = [block.parameters for block in loop.hift.plan.blocks]
    kept = [batch for i, batch in enumerate(batches) if i // accumulate not in broken]
    expected = torch.optim.lr_scheduler.ExponentialLR(optimizer, lr_decay)
    reference_loop(
        model, optimizer, blocks, turns_of("random", LAYERS, 3), kept, accumulate=accumulate, scheduler=expected
    )
    for (name, p), q in zip(loop.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert loop.hift.skipped_steps == len(broken) == 4
    assert scheduler.get_last_lr() == expected.get_last_lr()


@pytest.mark.parametrize("update", ["block", "streamed"])
@pytest.mark.parametrize("device_type", ["cpu", "sim"])
def test_an_error_names_update_block_and_parameter_and_leaves_everything_as_before(device_type, update, request):
    if device_type == "sim":
        request.getfixturevalue("sim_device")
    batches = make_batches(2 * LAYERS)
    failing, straight = Loop(device_type, update=update), Loop(device_type, update=update)
    broken = LAYERS + 1
    with failing.hift, straight.hift:
        for i, batch in enumerate(batches):
            for loop in (failing, straight):
                loop.loss(i, batch).backward()
                if loop is failing and i == broken:
                    before = loop.snapshot()
                    loop.model.layers[1].linear1.bias.grad[3] = math.inf
                    with pytest.raises(NonfiniteError) as failure:
                        loop.optimizer.step()
                    assert str(failure.value).startswith(
                        "The gradient of `layers.1.linear1.bias` has inf in update 6 (block 2, `layers.1`); weights "
                        "and optimizer state are as they were before it;"
                    )
                    assert "`nonfinite='skip'`" in str(failure.value)
                    assert_same(loop.snapshot(), before)
                    assert loop.hift.updates == broken
                    assert not loop.hift.has_gradient
                    loop.loss(i, batch).backward()
                loop.optimizer.step()
    assert_same(failing.snapshot(), straight.snapshot())


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("update", ["block", "streamed"])
def test_weights_that_an_update_has_made_nonfinite_end_the_run(update, nonfinite):
    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-8)

    loop = Loop(make_optimizer=adam, update=update, nonfinite=nonfinite)
    loop.model.half()  # in which 1e-8 is 0, and so is the square of a small gradient
    match = r"The loss has NaN in update 2 .*the weights of `[\w.]+` have inf from an earlier update.*`eps`"
    with pytest.raises(NonfiniteError, match=match):
        loop.run(make_batches(3), tell=True)
    assert "load a checkpoint from before" in loop.hift.half_updated
    assert loop.hift.skipped_steps == 0


@pytest.mark.filterwarnings("ignore:A step is left out")
def test_weights_that_are_infinite_on_purpose_do_not_end_a_run():
    loop = Loop(spikes=[2], nonfinite="skip")
    with torch.no_grad():
        loop.model.head.bias[0] = -math.inf  # a class that is left out
    loop.model.loss = lambda batch: loop.model(batch[0])[:, 1:].square().mean()
    loop.run(make_batches(5), tell=True)
    assert loop.hift.skipped_steps == 1
    assert loop.hift.updates == 4
    assert loop.hift.half_updated is None


def test_a_loss_without_gradients_is_named_too():
    loop = Loop()
    with loop.hift:
        loss = loop.loss(0, make_batches(1)[0])
        loss.backward()
        with pytest.raises(NonfiniteError, match=r"The loss has NaN in update 1 \(block 3, `head`\)"):
            loop.hift.after_backward(loss * math.nan)


def test_fused_names_the_parameter_and_the_weights_that_have_been_touched():
    loop = Loop(spikes=[1], update="fused")
    match = r"The gradient of `layers.1.linear2.bias` has NaN in update 2.*`update='streamed'`"
    with pytest.raises(NonfiniteError, match=match) as failure:
        loop.run(make_batches(2))
    assert "as they were" not in str(failure.value)
    (note,) = failure.value.__notes__
    changed = [name for name, p in loop.model.named_parameters() if p.isnan().any()]
    assert changed == [name for name, _ in loop.model.named_parameters() if name.startswith("layers.1.")]
    assert all(name in note for name in changed)
    assert "load the last checkpoint" in note


def test_what_a_failed_step_had_seen_is_forgotten():
    loop = Loop(update="fused")
    batches = make_batches(LAYERS)
    parameter = loop.model.norm.weight
    before = copy.deepcopy(loop.model.state_dict())

    def fail(_):
        raise ZeroDivisionError

    with loop.hift:
        handle = parameter.register_post_accumulate_grad_hook(fail)
        with pytest.raises(ZeroDivisionError):
            (loop.loss(0, batches[0]) * math.nan).backward()
        handle.remove()
        loop.hift.settle()
        loop.model.load_state_dict(before)
        loop.model.norm.bias.sum().backward()  # does not reach the others, whose gradients had NaN
        loop.optimizer.step()
    assert loop.hift.updates == 1


def test_masters_of_16_bit_weights_are_as_before_a_step_left_out():
    def make(**settings):
        loop = Loop(master_weights=True, **settings)
        loop.model.to(torch.bfloat16)
        return loop

    batches = make_batches(2 * LAYERS)
    with pytest.warns(UserWarning, match="A step is left out"):
        skipping = make(spikes=[2, 5], nonfinite="skip").run(batches)
    kept = [batch for i, batch in enumerate(batches) if i not in (2, 5)]
    assert_same(skipping.snapshot(), make().run(kept).snapshot())


def test_sparse_gradients_are_looked_at():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(8, 4, sparse=True)

    model = Sparse()
    optimizer = torch.optim.SparseAdam(model.parameters())
    before = model.embedding.weight.detach().clone()
    with HiFT(model, optimizer, HiFTSettings(nonfinite="skip")) as hift:
        (model.embedding(torch.tensor([1, 2, 1])).sum() * math.nan).backward()
        assert model.embedding.weight.grad.is_sparse
        with pytest.warns(UserWarning, match="is left out"):
            optimizer.step()
        assert hift.skipped_steps == 1
        assert torch.equal(model.embedding.weight, before)
        model.embedding(torch.tensor([1, 2, 1])).sum().backward()
        optimizer.step()
        assert hift.updates == 1
        assert not torch.equal(model.embedding.weight, before)


def test_only_the_first_step_left_out_is_told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loop(spikes=range(1, 8), nonfinite="skip").run(make_batches(8))
    told = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    assert told == [
        "A step is left out, because the gradient of `layers.1.self_attn.in_proj_weight` has NaN in update 2 (block 2, "
        "`layers.1`); further ones are counted in `skipped_steps`, without a warning."
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_grad_scaler_finds_is_its_own_business(fused):
    def make_optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    loop = Loop(spikes=[1, 2], value=math.inf, make_optimizer=make_optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with loop.hift:
        for i, batch in enumerate(make_batches(6)):
            loss = loop.loss(i, batch)
            scaler.scale(loss).backward()
            loop.hift.after_backward(loss, scaled=True)
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
    assert loop.hift.updates == 4
    assert loop.hift.skipped_steps == 0
    assert scaler.get_scale() == 2.0**8
    with loop.hift, pytest.raises(NonfiniteError, match="The loss has NaN"):
        loop.hift.after_backward(torch.tensor(math.nan), scaled=True)


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
@pytest.mark.parametrize("tell", [False, True])
def test_a_backward_pass_costs_one_synchronization(update, tell, monkeypatch):
    synchronizations = []

    def count(self):
        synchronizations.append(1)
        return item(self)

    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", count)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("all are searched, and nothing was found"))
    Loop(update=update, make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)).run(
        make_batches(LAYERS), tell=tell
    )
    assert len(synchronizations) == LAYERS
