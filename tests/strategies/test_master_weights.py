"""fp32 masters of 16-bit weights (the paper's Mixed^Hi), against a loop written by hand."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from hift_lightning import HiFT, HiFTManualMixin, HiFTSettings, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def fit(precision="bf16-true", optimizer="AdamW", accelerator="cpu", epochs=1, ckpt_path=None, **arguments):
    module = SmallTransformer(OPTIMIZERS[optimizer])
    strategy = HiFTStrategy(**{"master_weights": True, **arguments})
    trainer_ = trainer(strategy, precision=precision, accelerator=accelerator, devices=1, max_epochs=epochs)
    trainer_.fit(module, loader(make_batches(2 * LAYERS + 1)), ckpt_path=ckpt_path)
    return module, trainer_


def masters_of_strategy(strategy):
    return strategy.hift.state_dict()["masters"]


def masters_of(trainer_):
    return masters_of_strategy(trainer_.strategy)


def loop_by_hand(device, precision, optimizer, blocks):
    """Masters from the weights before rounding; each step updates the active block's and rounds them."""
    model = SmallTransformer().to(device)
    masters = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    model.to(DTYPES[precision])
    weights = dict(model.named_parameters())
    optimizer = OPTIMIZERS[optimizer](masters.values())
    for step, batch in enumerate(make_batches(2 * LAYERS + 1)):
        block = blocks[-1 - step % len(blocks)]
        for name, p in weights.items():
            p.requires_grad_(name in block)
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[precision])  # as Lightning's precision does in forward
        loss = model.loss([tensor.to(device) for tensor in batch])
        torch.set_default_dtype(default)
        loss.backward()
        for name in block:
            masters[name].grad = weights[name].grad.float()
        optimizer.step()
        for name in block:
            weights[name].grad = masters[name].grad = None
            weights[name].detach().copy_(masters[name].detach())
    return weights, masters


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD with momentum", "Adagrad", "Adafactor"])
def test_equals_a_loop_by_hand_exactly(any_device, precision, update, optimizer):
    window = "8KiB" if optimizer != "Adafactor" else "1MiB"
    module, trainer_ = fit(precision, optimizer, any_device.type, update=update, window=window)
    blocks = [block.parameters for block in trainer_.strategy.hift.plan.blocks]
    weights, masters = loop_by_hand(any_device.type, precision, optimizer, blocks)
    kept = masters_of(trainer_)
    for name, p in module.named_parameters():
        assert p.dtype == DTYPES[precision]
        assert kept[name].dtype == torch.float32
        assert torch.equal(kept[name], masters[name].cpu()), name
        assert torch.equal(p, weights[name].cpu()), name
        assert torch.equal(p, kept[name].to(p.dtype)), name


def test_masters_hold_what_rounding_would_lose():
    _, trainer_ = fit()
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters_of(trainer_).values())


def test_small_updates_are_lost_without_masters_and_kept_with_them():
    def small(parameters):
        return torch.optim.SGD(parameters, lr=1e-6)

    def run(**arguments):
        module = SmallTransformer(small)
        before = module.head.weight.detach().clone()
        strategy = HiFTStrategy(**arguments)
        trainer_ = trainer(strategy, precision="bf16-true")
        trainer_.fit(module, loader(make_batches(1)))
        return before, module, trainer_

    before, module, _ = run()
    assert torch.equal(module.head.weight, before.bfloat16())
    before, _, trainer_ = run(master_weights=True)
    assert not torch.equal(masters_of(trainer_)["head.weight"], before)


def test_training_follows_a_run_in_fp32():
    full = SmallTransformer()
    trainer().fit(full, loader(make_batches(2 * LAYERS + 1)))
    module, _ = fit()
    assert module.losses == pytest.approx(full.losses, rel=2e-2)


@pytest.mark.parametrize("update", ["block", "streamed"])
def test_resuming_takes_the_masters_from_the_checkpoint(update, tmp_path):
    _, stopped = fit(update=update)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert saved["hift"]["engines"][0]["masters"].keys() == dict(SmallTransformer().named_parameters()).keys()
    resumed, resumed_trainer = fit(update=update, epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
    straight, straight_trainer = fit(update=update, epochs=2)
    assert resumed.losses == straight.losses[2 * LAYERS + 1 :]
    for name, master in masters_of(straight_trainer).items():
        assert torch.equal(masters_of(resumed_trainer)[name], master), name


@pytest.mark.parametrize("offload", ["cpu", "files"])
def test_masters_park_where_state_does(offload, tmp_path):
    module, _ = fit(offload=tmp_path if offload == "files" else "cpu", update="streamed")
    expected, _ = fit()
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("precision", DTYPES)
def test_16_bit_weights_without_masters_are_warned_of(precision):
    with pytest.warns(UserWarning, match="16 bits and no fp32 masters.*never move; use `master_weights=True`"):
        fit(precision, "SGD with momentum", master_weights=False)


@pytest.mark.parametrize(
    ("precision", "master_weights"), [("32-true", False), ("bf16-mixed", False), ("bf16-true", True)]
)
def test_nothing_is_warned_of_where_weights_or_masters_have_32_bits(precision, master_weights, recwarn):
    fit(precision, master_weights=master_weights)
    assert not [warning for warning in recwarn if "masters" in str(warning.message)]


def test_masters_of_fp32_weights_are_refused():
    with pytest.raises(
        ConfigurationError,
        match="`embedding.weight` is torch.float32; let all that is trained have 16 bits \\(`precision='bf16-true'`",
    ):
        fit("32-true")


def test_a_plain_loop_has_masters_too():
    model = SmallTransformer().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with HiFT(model, optimizer, HiFTSettings(master_weights=True)) as hift:
        for batch in make_batches(LAYERS):
            model.loss(batch).backward()
            optimizer.step()
    for name, master in hift.state_dict()["masters"].items():
        assert torch.equal(model.get_parameter(name), master.bfloat16())


def test_an_earlier_state_takes_back_masters_that_were_made_since():
    model = SmallTransformer().bfloat16()
    hift = HiFT(model, torch.optim.AdamW(model.parameters(), lr=1e-2), HiFTSettings(master_weights=True))
    with hift:
        before = hift.state_dict()
        model.loss(make_batches(1)[0]).backward()
        hift.optimizer.step()
        assert hift.state_dict()["masters"]
        hift.load_state_dict(before)
        assert hift.state_dict()["masters"] == {}


@pytest.mark.parametrize("offload", ["cpu", "files"])
def test_the_master_state_dict_has_masters_where_there_are_any_and_all_else_as_it_is(offload, tmp_path):
    class WithBuffers(SmallTransformer):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(3))
            self.tied = self.head
            self.norm.requires_grad_(False)

    module = WithBuffers()
    strategy = HiFTStrategy(master_weights=True, offload=tmp_path if offload == "files" else offload)
    with pytest.raises(MisconfigurationException, match="called before `Trainer.fit`"):
        strategy.master_state_dict()
    trainer(strategy, precision="bf16-true").fit(module, loader(make_batches(LAYERS)))
    state, kept = strategy.master_state_dict(), masters_of_strategy(strategy)
    assert list(state) == list(module.state_dict())
    for name, value in module.state_dict().items():
        first = name.replace("tied.", "head.")
        if first in kept:
            assert state[name].dtype == torch.float32
            assert state[name].device.type == "cpu"
            assert torch.equal(state[name], kept[first])
            assert torch.equal(state[name].to(value.dtype), value)
        else:
            assert name in ("count", "norm.weight", "norm.bias")
            assert torch.equal(state[name], value)
            assert state[name].dtype == value.dtype
    assert state["tied.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert {name for name in state if name in kept} == {
        name for name, p in module.named_parameters() if p.requires_grad
    }
    again = strategy.hift.master_state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_weights_not_updated_yet_are_their_own_masters():
    model = SmallTransformer().bfloat16()
    hift = HiFT(model, torch.optim.AdamW(model.parameters(), lr=1e-2), HiFTSettings(master_weights=True))
    with hift:
        model.loss(make_batches(1)[0]).backward()
        hift.optimizer.step()
    dtypes = {name: value.dtype for name, value in hift.master_state_dict().items()}
    assert dtypes["head.weight"] == torch.float32
    assert dtypes["embedding.weight"] == torch.bfloat16


def test_the_strategy_has_the_masters_of_several_optimizers():
    class TwoOptimizers(HiFTManualMixin, SmallTransformer):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            top = {*self.head.parameters(), *self.norm.parameters()}
            below = [p for p in self.parameters() if p not in top]
            return [torch.optim.AdamW(below, lr=1e-2), torch.optim.SGD(list(top), lr=1e-2)]

        def training_step(self, batch, batch_idx):
            for index in range(2):
                self.hift_step(self.loss(batch), optimizer=index)

    module = TwoOptimizers()
    strategy = HiFTStrategy(master_weights=True)
    trainer(strategy, precision="bf16-true").fit(module, loader(make_batches(LAYERS)))
    assert len(strategy.engines) == 2
    state = strategy.master_state_dict()
    for engine in strategy.engines:
        for name, master in engine.state_dict()["masters"].items():
            assert torch.equal(state[name], master)
    assert {value.dtype for value in state.values()} == {torch.float32}


class Convolutions(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("update", ["block", "streamed"])
def test_weights_in_another_memory_format_have_masters(update):
    def trained(memory_format):
        module = Convolutions().to(memory_format=memory_format)
        strategy = HiFTStrategy(master_weights=True, update=update)
        data = loader(list(torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))))
        trainer(strategy, precision="bf16-true").fit(module, data)
        return masters_of_strategy(strategy)

    expected = trained(torch.contiguous_format)
    for name, master in trained(torch.channels_last).items():
        torch.testing.assert_close(master, expected[name], rtol=0, atol=5e-3)


def test_masters_are_made_of_the_fp32_weights_of_a_checkpoint(tmp_path):
    wide = SmallTransformer()
    trained = trainer()
    trained.fit(wide, loader(make_batches(LAYERS)))
    trained.save_checkpoint(tmp_path / "fp32.ckpt")
    module, _ = at_start_of(tmp_path / "fp32.ckpt", precision="bf16-true", master_weights=True)
    for name, weights in wide.named_parameters():
        assert torch.equal(module[name], weights), name


def test_masters_made_of_weights_that_were_rounded_before_are_warned_of(recwarn, tmp_path):
    def told():
        return [str(each.message) for each in recwarn if "masters are made of the rounded ones" in str(each.message)]

    batches = loader(make_batches(LAYERS))
    module = SmallTransformer()
    trainer_ = trainer(HiFTStrategy(master_weights=True), precision="bf16-true")
    trainer_.fit(module, batches)
    trainer_.save_checkpoint(tmp_path / "trained.ckpt")
    trainer_.validate(module, batches)
    other = trainer(HiFTStrategy(master_weights=True), precision="bf16-true", max_epochs=2)
    other.validate(SmallTransformer(), batches)
    other.fit(SmallTransformer(), batches)  # another module
    assert not told()
    unread = SmallTransformer()
    last = trainer(HiFTStrategy(master_weights=True), precision="bf16-true", max_epochs=2)
    last.validate(unread, batches)
    last.fit(unread, batches, ckpt_path=tmp_path / "trained.ckpt")  # which has masters
    assert not told()
    trainer_.validate(module := SmallTransformer(), batches)
    trainer_.fit_loop.max_epochs = 2  # it has trained one
    trainer_.fit(module, batches)
    assert len(told()) == 1
    assert "weights of `SmallTransformer`" in told()[0]


@pytest.mark.parametrize(
    ("saves", "goes_on"),
    [
        ({"precision": "bf16-true", "master_weights": True}, {"precision": "32-true"}),
        ({"precision": "32-true"}, {"precision": "bf16-true", "master_weights": True}),
    ],
)
def test_beside_averages_the_weights_that_training_goes_on_from_are_the_wider_ones(saves, goes_on, tmp_path):
    def averaging():
        return L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer_, module, *_):
            self.weights = {n: w.clone() for n, w in trainer_.strategy.master_state_dict().items()}
            trainer_.save_checkpoint(tmp_path / "last.ckpt")

    precision = saves.pop("precision")
    trained = trainer(HiFTStrategy(**saves), precision=precision, callbacks=[averaging(), notes := Notes()])
    trained.fit(SmallTransformer(), loader(make_batches(2 * LAYERS + 1)))
    masters, _ = at_start_of(tmp_path / "last.ckpt", callbacks=[averaging()], **goes_on)
    for name, weights in notes.weights.items():
        assert torch.equal(masters[name], weights), name


def test_masters_of_a_checkpoint_become_the_weights_of_a_run_in_fp32(tmp_path):
    _, trained = fit()
    trained.save_checkpoint(tmp_path / "masters.ckpt")
    expected = masters_of(trained)
    _, weights = at_start_of(tmp_path / "masters.ckpt", precision="32-true")
    for name, master in expected.items():
        assert torch.equal(weights[name], master), name


def test_weights_of_a_checkpoint_that_were_set_from_outside_count_over_their_masters(tmp_path):
    class Clamps(L.Callback):
        def on_train_end(self, trainer_, module):
            for parameter in module.parameters():
                parameter.data.clamp_(-0.05, 0.05)

    trained = trainer(HiFTStrategy(master_weights=True), precision="bf16-true", callbacks=[Clamps()])
    trained.fit(SmallTransformer(), loader(make_batches(2 * LAYERS + 1)))
    trained.save_checkpoint(tmp_path / "clamped.ckpt")
    _, weights = at_start_of(tmp_path / "clamped.ckpt", precision="32-true")
    assert max(value.abs().max() for value in weights.values()) < 0.0502


def at_start_of(path, precision, callbacks=(), **arguments):
    """Masters (or weights) and weights at the start of a run that goes on from a checkpoint."""
    seen = {}

    class Looks(L.Callback):
        def on_train_start(self, trainer_, module):
            seen["masters"] = {name: value.clone() for name, value in trainer_.strategy.master_state_dict().items()}
            seen["weights"] = {name: value.clone() for name, value in module.state_dict().items()}

    trainer_ = trainer(HiFTStrategy(**arguments), precision=precision, max_epochs=2, callbacks=[*callbacks, Looks()])
    trainer_.fit(SmallTransformer(), loader(make_batches(2 * LAYERS + 1)), ckpt_path=path)
    return seen["masters"], seen["weights"]
