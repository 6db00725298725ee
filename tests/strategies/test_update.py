"""``streamed`` and ``fused`` give what ``block`` gives, bit for bit, through a window of bounded size."""

import re
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision

from hift_lightning import HiFT, HiFTSettings, HiFTStrategy
from hift_lightning.engine.elementwise import probe
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.residency import Residency
from tests import simulated_accelerator as sim
from tests.adversarial import Adversarial
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS

ELEMENTWISE = {
    "AdamW", "AdamW amsgrad", "AdamW fused", "AdamW foreach", "Adam", "SGD", "SGD with momentum", "Adagrad", "RMSprop",
    "NAdam", "Lion-like",
}  # fmt: skip


def fit(accelerator="cpu", optimizer="AdamW", batches=2 * LAYERS + 1, strategy=None, **arguments):
    module = SmallTransformer(OPTIMIZERS[optimizer])
    trainer_ = trainer(strategy, accelerator=accelerator, devices=1, **arguments)
    trainer_.fit(module, loader(make_batches(batches)))
    return module, trainer_


def assert_same_run(left, right):
    (module, trainer_), (expected, expected_trainer) = left, right
    assert module.losses == expected.losses
    for (name, p), q in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
    states = [t.optimizers[0].state_dict()["state"] for t in (trainer_, expected_trainer)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, states[1][index][key]), (index, key)


@pytest.mark.parametrize("update", ["streamed", "fused"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "AdamW fused"])
def test_equals_block_exactly_on_a_device(device, update, name):
    window = "6KiB" if name in ELEMENTWISE else "1MiB"  # cuts every matrix of the model
    block = fit(device.type, name, strategy=HiFTStrategy())
    pieces = fit(device.type, name, strategy=HiFTStrategy(update=update, window=window))
    assert_same_run(pieces, block)


@pytest.mark.parametrize("update", ["streamed", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_block_exactly_on_the_cpu(update, name):
    assert_same_run(fit("cpu", name, strategy=HiFTStrategy(update=update)), fit("cpu", name, strategy=HiFTStrategy()))


class OfOneNorm(torch.optim.SGD):
    """Scales its step by the norm of all gradients together."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        for p in parameters:
            p.sub_(p.grad / norm * self.param_groups[0]["lr"])


@pytest.mark.parametrize("rate", [0.0, 1e-30, torch.tensor(0.0), torch.tensor(1)])
def test_a_rate_at_which_nothing_is_seen_to_move_hides_nothing(rate):
    weights = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = OfOneNorm([weights], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate  # as a warm-up sets it
    assert not probe(optimizer, weights, torch.float32).separate
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_elementwise_is_found_out(name):
    module = SmallTransformer(OPTIMIZERS[name])
    optimizer = module.configure_optimizers()
    before = [p.detach().clone() for p in module.parameters()]
    result = probe(optimizer, module.head.weight, torch.float32)
    assert result.separate
    assert result.elementwise == (name in ELEMENTWISE)
    states = {
        "Adam": 8,
        "AdamW": 8,
        "AdamW amsgrad": 12,
        "SGD": 0,
        "SGD with momentum": 4,
        "Lion-like": 4,
        "Adagrad": 4,
    }
    if name in states:
        assert result.state_bytes == states[name]
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert not [p for p in optimizer.state if "step" in optimizer.state[p] and optimizer.state[p]["step"] > 0]


class GlobalNorm(torch.optim.Optimizer):
    """Divides by the norm over all parameters, so that they are not treated one by one."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        with_gradient = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if with_gradient:
            norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient])
            for p in with_gradient:
                p.sub_(p.grad / norm, alpha=0.1)


class ClipsAbove(torch.optim.SGD):
    """Clips gradients by the norm of all together, if that is above a limit."""

    def __init__(self, params, limit):
        super().__init__(params, lr=0.1)
        self.limit = limit

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.limit)
        super().step()


class CountsInItsGroup(torch.optim.SGD):
    """Counts its calls in the param group, as some optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
        super().step()


@pytest.mark.parametrize(
    "make",
    [
        GlobalNorm,
        lambda p: ClipsAbove(p, 0.01),
        lambda p: ClipsAbove(p, 10.0),
        lambda p: ClipsAbove(p, 1000.0),
        lambda p: CountsInItsGroup([{"params": p, "calls": 0}], lr=0.1),
    ],
)
@pytest.mark.parametrize("arguments", [{"update": "streamed"}, {"update": "fused", "offload": "none"}])
def test_an_optimizer_that_couples_parameters_is_refused(any_device, make, arguments):
    module = SmallTransformer(lambda parameters: make(list(parameters)))
    with pytest.raises(ConfigurationError, match="could not be shown to treat parameters one by one"):
        trainer(HiFTStrategy(**arguments), accelerator=any_device.type, devices=1).fit(module, loader(make_batches(1)))


@pytest.mark.parametrize("update", ["streamed", "fused"])
def test_param_groups_are_those_of_the_step(update, tmp_path):
    def train(**settings):
        model = SmallTransformer()
        halves = list(model.layers.parameters()), list(model.head.parameters())
        optimizer = torch.optim.SGD([{"params": halves[0], "lr": 0.1}, {"params": halves[1], "lr": 0.01}])
        with HiFT(model, optimizer, HiFTSettings(offload=tmp_path, **settings)) as hift:
            for step, batch in enumerate(make_batches(9)):
                if step == 4:  # what was at the lower rate is at the higher one from here on
                    first, second = optimizer.param_groups
                    first["params"], second["params"] = second["params"], first["params"]
                model.loss(batch).backward()
                hift.optimizer.step()
        return model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are in no param group")
        assert_same(train(update=update).state_dict(), train().state_dict())


def test_a_window_that_one_tensor_does_not_fit_is_refused_with_the_size_needed(device):
    with pytest.raises(ConfigurationError, match="cannot be stepped on parts of a tensor.*`window` of at least"):
        fit(device.type, "Muon-like", strategy=HiFTStrategy(update="streamed", window="1KiB"))
    with pytest.raises(ConfigurationError, match="use a window of at least"):
        fit(device.type, "AdamW", strategy=HiFTStrategy(update="streamed", window=2100))


@pytest.mark.parametrize("name", ["Muon-like", "AdamW"])
def test_no_more_is_taken_than_the_window_that_the_error_asks_for(device, monkeypatch, name):
    taken = []
    make_window = Residency.window

    def watched(residency, nbytes, device):
        taken.append(nbytes)
        return make_window(residency, nbytes, device)

    monkeypatch.setattr(Residency, "window", watched)
    window, refused = 2100, True
    while refused:
        taken.clear()
        try:
            fit(device.type, name, strategy=HiFTStrategy(update="streamed", window=window))
            refused = False
        except ConfigurationError as error:
            *_, asked = re.findall(r"[\d,]+\d(?= bytes)", str(error))
            assert int(asked.replace(",", "")) > window
            window = int(asked.replace(",", ""))
    assert window > 2100
    assert 0 < max(taken) <= window


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
@pytest.mark.parametrize("offload", ["cpu", "files", "none"])
def test_every_place_to_park_gives_the_same_run(any_device, update, offload, tmp_path):
    offload = tmp_path if offload == "files" else offload
    arguments = {"update": update, "window": "6KiB"} if offload != "none" else {"update": update}
    expected = fit(any_device.type, strategy=HiFTStrategy())
    assert_same_run(fit(any_device.type, strategy=HiFTStrategy(offload=offload, **arguments)), expected)


@pytest.mark.parametrize("update", ["streamed", "fused"])
def test_value_clipping_equals_that_of_block(update):
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    assert_same_run(fit(strategy=HiFTStrategy(update=update), **clip), fit(strategy=HiFTStrategy(), **clip))


@pytest.mark.parametrize("clip", [0, 0.0])
def test_clipping_by_nothing_leaves_gradients_as_they_are(clip):
    fused = fit(strategy=HiFTStrategy(update="fused"), gradient_clip_val=clip)
    assert_same_run(fused, fit(strategy=HiFTStrategy()))


def test_streamed_goes_with_norm_clipping_accumulation_and_a_scaler():
    arguments = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    assert_same_run(
        fit(strategy=HiFTStrategy(update="streamed"), **arguments), fit(strategy=HiFTStrategy(), **arguments)
    )

    def scaled():
        return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}

    assert_same_run(fit(strategy=HiFTStrategy(update="streamed"), **scaled()), fit(strategy=HiFTStrategy(), **scaled()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_clip_val": 1.0}, "clips by norm"),
        ({"accumulate_grad_batches": 2}, "sums gradients over batches"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "sums gradients over batches"),
        ({"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}, "GradScaler"),
    ],
)
def test_fused_refuses_what_needs_all_gradients(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(strategy=HiFTStrategy(update="fused"), **arguments)


def test_fused_refuses_a_module_that_clips_in_its_own_way():
    class Clips(SmallTransformer):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    with pytest.raises(MisconfigurationException, match=r"`Clips.configure_gradient_clipping` clips gradients"):
        trainer(HiFTStrategy(update="fused")).fit(Clips(), loader(make_batches(1)))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_fused_refuses_gradients_that_are_clipped_by_hand(algorithm):
    class Clips(SmallTransformer):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
            optimizer.step()

    with pytest.raises(MisconfigurationException, match=r"`clip_gradients` clips those of the step"):
        trainer(HiFTStrategy(update="fused")).fit(Clips(), loader(make_batches(1)))


def test_fused_refuses_a_loss_that_reaches_another_optimizers_parameters():
    with pytest.raises(ConfigurationError, match=r"`discriminator.* has a gradient for the second time in one step"):
        trainer(HiFTStrategy(update="fused")).fit(Adversarial(), loader([torch.randn(3, 4)] * 2))


@pytest.mark.parametrize(
    ("argument", "value"),
    [("update", "sideways"), ("window", "big"), ("window", 0), ("window", "3 XB"), ("parked_dtype", "float16")],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ConfigurationError, match=f"`{argument}={value!r}`"):
        HiFTStrategy(**{argument: value})


@pytest.mark.parametrize("window", ["6KiB", "20KiB"])
def test_no_more_than_the_window_is_on_the_device(device, window):
    """The peak of the second cycle's updates, over that of SGD without state, is at most the window."""
    peaks = {}
    for name in ("AdamW", "SGD"):

        class Peak(SmallTransformer):
            peaks = []  # noqa: RUF012 (each run has a class of its own)

            def on_before_optimizer_step(self, optimizer):
                device.reset_peak()
                self.before = device.allocated()

            def on_train_batch_end(self, outputs, batch, batch_idx):
                self.peaks.append(device.peak() - self.before)

        def make(parameters, name=name):
            optimizer = torch.optim.AdamW if name == "AdamW" else torch.optim.SGD
            return optimizer(parameters, lr=1e-2, foreach=False)

        strategy = HiFTStrategy(update="streamed", window=window)
        trainer(strategy, accelerator=device.type, devices=1).fit(Peak(make), loader(make_batches(2 * LAYERS)))
        peaks[name] = max(Peak.peaks[LAYERS:])
    size = int(window.removesuffix("KiB")) * 1024
    temporaries = size // 2  # AdamW's denominator, made in two steps, has the bytes of the state of a piece
    assert 0 < peaks["AdamW"] <= size + temporaries + device.scalars


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
@pytest.mark.parametrize("masters", [False, True])
def test_bytes_moved_are_the_blocks_state_and_masters_each_way(sim_device, update, masters):
    class Meter(SmallTransformer):
        def on_train_batch_start(self, batch, batch_idx):
            sim.reset_copy_counters()  # the batch is there

        def on_train_batch_end(self, outputs, batch, batch_idx):
            moved.append((sim.host_to_device_bytes(), sim.device_to_host_bytes()))

    moved = []
    strategy = HiFTStrategy(update=update, window="12KiB", master_weights=masters)
    trainer_ = trainer(strategy, accelerator="sim", devices=1, precision="bf16-true" if masters else "32-true")
    trainer_.fit(Meter(), loader(make_batches(3 * LAYERS)))
    for step, block in enumerate(list(reversed(strategy.hift.plan.blocks)) * 3):
        state = 2 * 4 * block.numel
        master = 4 * block.numel if masters else 0
        assert moved[step] == (master + (state if step >= LAYERS else 0), state + master), step
