"""`strategy="hift_ddp"`: several ranks train the model that one process with all their batches trains."""

import contextlib
import copy
import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hift_lightning import HiFT, HiFTDDPStrategy, HiFTManualMixin, HiFTSettings, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError, NonfiniteError
from hift_lightning.engine.reduction import Ranks
from tests.adversarial import Adversarial
from tests.comparing import assert_same
from tests.processes import RankError, run
from tests.small_transformer import LAYERS, SmallTransformer, make_batches, trainer

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}
STEPS = 2 * LAYERS  # two cycles


@dataclasses.dataclass(frozen=True)
class Case:
    strategy: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "AdamW"
    precision: str = "64-true"
    accumulate: int = 1
    clip: float | None = None

    @property
    def tolerance(self) -> float:
        return {"32-true": 1e-6, "64-true": 1e-10, "bf16-true": 5e-2}[self.precision]


CASES = {
    "SGD in fp32": Case({}, "SGD", "32-true"),
    "AdamW": Case(),
    "small buckets": Case({"bucket_cap_mb": 0.001, "order": "bottom2up"}),
    "accumulating and clipping": Case(accumulate=2, clip=0.1),
    "streamed, two layers a block": Case({"update": "streamed", "group_size": 2}),
    "fused": Case({"update": "fused"}),
    "split": Case({"shard_parked_state": True}),
    "split and clipping, Adagrad": Case({"shard_parked_state": True}, "Adagrad", clip=0.1),
    "split, fused": Case({"shard_parked_state": True, "update": "fused"}),
    "split, in files": Case({"shard_parked_state": True, "offload": "files"}),
    "always active": Case({"always_active": ["head.*"], "update": "fused"}),
    "split, always active": Case({"always_active": ["head.*"], "shard_parked_state": True}, clip=0.1),
    "masters": Case({"master_weights": True}, precision="bf16-true"),
    "split, masters": Case({"shard_parked_state": True, "master_weights": True}, precision="bf16-true"),
}


def fit(case: Case, strategy: Any, batches: Any, module: Any = None, **arguments: Any) -> tuple[Any, Any]:
    module = module or SmallTransformer(OPTIMIZERS[case.optimizer])
    trainer_ = trainer(
        strategy,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        use_distributed_sampler=False,
        **{"precision": case.precision, "devices": int(os.environ.get("WORLD_SIZE", 1)), **arguments},
    )
    trainer_.fit(module, GoesOn(batches))
    return module, trainer_


def alone(case: Case, batches: Any, **arguments: Any) -> tuple[Any, Any]:
    settings = {k: v for k, v in case.strategy.items() if k not in ("bucket_cap_mb", "shard_parked_state", "offload")}
    return fit(case, HiFTStrategy(**settings), batches, **arguments)


def batches_of(case: Case, ranks: int) -> Any:
    return make_batches(STEPS * case.accumulate, size=4 * ranks)


def share(batches: Any) -> Any:
    """What of each batch is for this rank."""
    return [tuple(tensor[dist.get_rank() :: dist.get_world_size()] for tensor in batch) for batch in batches]


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_close(left: Any, right: Any, tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name] - right[name]).abs().max() <= tolerance, name


# --- what is trained -----------------------------------------------------------------------------------------------


def train_cases(names: list[str], folder: Path) -> dict[str, Any]:
    found = {}
    for name in names:
        case = CASES[name]
        settings = {**case.strategy, **({"offload": folder} if "offload" in case.strategy else {})}
        module, trainer_ = fit(case, HiFTDDPStrategy(**settings), share(batches_of(case, dist.get_world_size())))
        engine = trainer_.strategy.hift
        parked = {block.index: block.parked_bytes for block in engine.report().blocks}
        wide = {name: value.dtype for name, value in trainer_.strategy.master_state_dict().items()}
        found[name] = weights(module), engine.reduction.bytes_sent, parked, module.rates, wide
    return found


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return run(train_cases, 2, list(CASES), tmp_path_factory.mktemp("parked"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process_with_all_their_batches_and_each_other(name: str, on_two_ranks: Any) -> None:
    case = CASES[name]
    first, second = (rank[name][0] for rank in on_two_ranks)
    assert_same(first, second)
    one, _ = alone(case, batches_of(case, 2))
    assert_close(first, weights(one), case.tolerance)
    assert_close(first, first, 0.0)


def test_four_ranks_do_too(tmp_path: Path) -> None:
    names = ["AdamW", "split"]
    results = run(train_cases, 4, names, tmp_path)
    for name in names:
        one, _ = alone(CASES[name], batches_of(CASES[name], 4))
        for rank in results:
            assert_same(rank[name][0], results[0][name][0])
        assert_close(results[0][name][0], weights(one), 1e-10)
    held = [sum(rank["split"][2].values()) for rank in results]
    assert sum(held) == sum(results[0]["AdamW"][2].values())
    assert max(held) < 0.5 * sum(held)


def test_split_state_is_held_once_by_the_ranks_together(on_two_ranks: Any) -> None:
    whole = sum(on_two_ranks[0]["AdamW"][2].values())
    shares = [sum(rank["split"][2].values()) for rank in on_two_ranks]
    assert sum(shares) == whole
    assert max(shares) < 0.6 * whole


def test_split_masters_are_the_same_and_held_once_by_the_ranks_together(on_two_ranks: Any) -> None:
    whole, split = ([rank[name] for rank in on_two_ranks] for name in ("masters", "split, masters"))
    assert_same(whole[0][0], split[0][0])
    assert set(whole[0][4].values()) == set(split[0][4].values()) == {torch.float32}
    shares = [sum(rank[2].values()) for rank in split]
    assert sum(shares) == sum(whole[0][2].values())
    assert max(shares) < 0.6 * sum(shares)


def choose_a_group() -> Any:
    case = Case(precision="32-true")
    rows = 2 + 2 * dist.get_rank()  # so that each would choose for itself
    batches = [tuple(tensor[:rows] for tensor in batch) for batch in share(batches_of(case, 2))]
    strategy = HiFTDDPStrategy(group_size="auto", memory_budget="2GiB")
    module, _ = fit(case, strategy, batches)
    return strategy.settings, weights(module)


def test_ranks_take_the_group_size_that_the_first_one_chooses() -> None:
    (settings, first), (same_settings, second) = run(choose_a_group, 2)
    assert settings == same_settings
    assert settings.group_size == LAYERS
    assert_same(first, second)


# --- what is sent --------------------------------------------------------------------------------------------------


class _Counts:
    """Bytes that this rank gives to collectives, by their name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> "_Counts":
        self._patch = pytest.MonkeyPatch()
        for name in ("all_reduce", "broadcast", "all_gather"):
            self._patch.setattr(dist, name, self._counted(name, getattr(dist, name)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            self.calls.append((name, tensor.nbytes))
            return function(*args, **kwargs)

        return call


class _NotesCollectives(Callback):
    def __init__(self, counts: _Counts) -> None:
        self.counts, self.steps, self.blocks = counts, [], []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.counts.calls.clear()
        self.blocks.append(sum(p.nbytes for p in module.parameters() if p.requires_grad))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.steps.append(list(self.counts.calls))


def count_what_is_sent() -> Any:
    batches = share(batches_of(CASES["AdamW"], 2))
    hift = {}
    for accumulate in (1, 2):
        with _Counts() as counts:
            seen = _NotesCollectives(counts)
            case = Case(accumulate=accumulate)
            fit(case, HiFTDDPStrategy(bucket_cap_mb=0.004), batches, callbacks=[seen])
        hift[accumulate] = seen.steps, seen.blocks
    plain: list[int] = []

    def send(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        plain.append(bucket.buffer().nbytes)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    module = SmallTransformer().double()
    wrapped = DistributedDataParallel(module)
    wrapped.register_comm_hook(None, send)
    nn.functional.cross_entropy(wrapped(batches[0][0]), batches[0][1]).backward()
    return hift, sum(plain), sum(p.nbytes for p in module.parameters())


def test_a_step_sends_the_active_block_in_small_buckets_and_a_few_numbers_where_ddp_sends_the_model() -> None:
    hift, plain, model_bytes = run(count_what_is_sent, 2)[0]
    assert plain == model_bytes
    steps, blocks = hift[1]
    for calls, block in zip(steps, blocks, strict=True):
        reduced = [nbytes for name, nbytes in calls if name == "all_reduce"]
        assert sum(reduced) == block < plain / 2
        assert max(reduced) <= block
        told = [nbytes for name, nbytes in calls if name != "all_reduce"]
        assert len(told) == 2  # opening and closing
        assert sum(told) < 300
    assert sum(n for calls in steps for name, n in calls if name == "all_reduce") == 2 * model_bytes  # two cycles


def test_nothing_is_sent_for_the_micro_batches_before_the_last_of_a_window() -> None:
    hift, _, _ = run(count_what_is_sent, 2)[1]
    steps, blocks = hift[2]
    assert [len(calls) for calls in steps[::2]] == [0] * (STEPS // 2)
    for calls, block in zip(steps[1::2], blocks[1::2], strict=True):
        assert sum(nbytes for name, nbytes in calls if name == "all_reduce") == block


def order_of_events() -> list[str]:
    events: list[str] = []
    module = SmallTransformer()
    module.head.register_full_backward_hook(lambda *args: events.append("head"))
    module.layers[0].register_full_backward_pre_hook(lambda *args: events.append("layer 0"))
    reduce = dist.all_reduce
    patch = pytest.MonkeyPatch()
    patch.setattr(dist, "all_reduce", lambda *a, **k: (events.append("send"), reduce(*a, **k))[1])
    strategy = HiFTDDPStrategy(group_size=LAYERS, bucket_cap_mb=0.001)
    fit(Case(precision="32-true"), strategy, share(make_batches(1, size=8)), module)
    patch.undo()
    return events


def test_sending_begins_while_backward_still_goes_on() -> None:
    events = run(order_of_events, 2)[0]
    assert "send" in events[: events.index("layer 0")]


# --- what ranks agree on ---------------------------------------------------------------------------------------------


class NaNOnOneRank(SmallTransformer):
    """The loss of rank 1 is NaN in two batches."""

    bad = (2, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if dist.get_rank() == 1 and batch_idx in self.bad else loss


class SkipsLayerOnOneRank(SmallTransformer):
    """Rank 1 goes around layer 1 in some batches, and both around layer 0 in one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.around = {1} if dist.get_rank() == 1 and batch_idx % 2 else set()
        self.around |= {0} if batch_idx == 2 else set()
        return super().training_step(batch, batch_idx)

    def forward(self, tokens: Any) -> Any:
        hidden = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            hidden = hidden if i in self.around else layer(hidden)
        return self.head(self.norm(hidden).mean(1))


class _AnotherUpdate(Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 3 and dist.get_rank() == 1:
            trainer.strategy.hift.updates += LAYERS  # the same block, a cycle later


def agree() -> dict[str, Any]:
    case, batches = Case(), share(batches_of(Case(), 2))
    found: dict[str, Any] = {}
    module, trainer_ = fit(case, HiFTDDPStrategy(nonfinite="skip"), batches, NaNOnOneRank())
    found["skip"] = weights(module), trainer_.strategy.hift.skipped_steps, trainer_.strategy.hift.updates
    accumulating = dataclasses.replace(case, accumulate=2)
    module, trainer_ = fit(accumulating, HiFTDDPStrategy(nonfinite="skip"), batches, NaNOnOneRank())
    found["skip in a window"] = weights(module), trainer_.strategy.hift.skipped_steps, trainer_.strategy.hift.updates
    for name, update in (("raise", "block"), ("raise, fused", "fused")):
        try:
            fit(case, HiFTDDPStrategy(update=update), batches, NaNOnOneRank())
        except NonfiniteError as error:
            found[name] = str(error)
    for update in ("block", "fused"):
        module, trainer_ = fit(case, HiFTDDPStrategy(update=update), batches, SkipsLayerOnOneRank())
        found[f"around a layer, {update}"] = weights(module), trainer_.strategy.hift.updates
    try:
        fit(case, HiFTDDPStrategy(), batches, callbacks=[_AnotherUpdate()])
    except RuntimeError as error:
        found["disagreement"] = str(error)
    return found


@pytest.fixture(scope="module")
def agreements() -> list[dict[str, Any]]:
    return run(agree, 2)


def test_a_step_with_nan_on_one_rank_is_left_out_on_all(agreements: Any) -> None:
    (first, skipped, updates), (second, *rest) = (rank["skip"] for rank in agreements)
    assert_same(first, second)
    assert [skipped, updates] == rest == [2, STEPS - 2]
    kept = [batch for i, batch in enumerate(batches_of(Case(), 2)) if i not in NaNOnOneRank.bad]
    assert_close(first, weights(alone(Case(), kept)[0]), 1e-10)


def test_a_window_with_nan_on_one_rank_is_left_out_on_all(agreements: Any) -> None:
    (first, skipped, updates), (second, *rest) = (rank["skip in a window"] for rank in agreements)
    assert_same(first, second)
    assert [skipped, updates] == rest == [2, 2]
    batches = batches_of(Case(), 2)
    kept = [*batches[:2], *batches[6:8]]  # of the windows (0, 1), (2, 3), (4, 5), (6, 7)
    assert_close(first, weights(alone(Case(accumulate=2), kept)[0]), 1e-10)


@pytest.mark.parametrize("name", ["raise", "raise, fused"])
def test_nan_on_one_rank_is_an_error_on_all_that_names_it(name: str, agreements: Any) -> None:
    for rank in agreements:
        assert rank[name].startswith("The loss of rank 1 has NaN in update 3")


@pytest.mark.parametrize("update", ["block", "fused"])
def test_a_layer_that_only_some_ranks_use_is_trained_by_them(update: str, agreements: Any) -> None:
    (first, updates), (second, _) = (rank[f"around a layer, {update}"] for rank in agreements)
    assert updates == STEPS
    assert_same(first, second)
    assert not torch.equal(first["layers.1.linear1.weight"], SmallTransformer().double().layers[1].linear1.weight)
    assert_same(first, agreements[0]["around a layer, block"][0])


def test_ranks_at_different_updates_are_an_error_on_all_at_once(agreements: Any) -> None:
    for rank in agreements:
        assert "not at the same step (rank 0: update 5; rank 1: update 9)" in rank["disagreement"]


ADVERSARIAL = {
    "as it is": {},
    "toggled": {"toggle": True},
    "toggled, 2 batches": {"toggle": True, "accumulate": 2},
    "clipped": {"toggle": True, "clip": 1e-2},
    "clipped, 2 batches": {"toggle": True, "clip": 1e-2, "accumulate": 2},
    "clipped always, 2 batches": {"toggle": True, "clip": 1e-2, "clip_always": True, "accumulate": 2},
}


def adversarial_on_two_ranks() -> Any:
    batches = [part[dist.get_rank() :: 2] for part in torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0))]
    return {
        name: weights(fit(Case(), HiFTDDPStrategy(), batches, Adversarial(**arguments).double())[0])
        for name, arguments in ADVERSARIAL.items()
    }


def test_two_optimizers_by_hand_each_take_the_averages_of_their_own_loss() -> None:
    batches = list(torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0)))
    first, second = run(adversarial_on_two_ranks, 2)
    for name, arguments in ADVERSARIAL.items():
        one, _ = fit(Case(), HiFTStrategy(), batches, Adversarial(**arguments).double())
        assert_same(first[name], second[name])
        assert_close(first[name], weights(one), 1e-10)


class OverflowsOnOneRank(Adversarial):
    """The loss of rank 1 overflows in the second batch; notes the scale after each."""

    def __init__(self) -> None:
        super().__init__(toggle=True)
        self.scales: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch * 1e30 if batch_idx == 1 and dist.get_rank() == 1 else batch, batch_idx)
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def overflow_on_one_rank() -> Any:
    batches = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module, trainer_ = fit(
        Case({}, "SGD", "32-true"),
        HiFTDDPStrategy(),
        batches,
        OverflowsOnOneRank(),
        precision=None,
        plugins=MixedPrecision("16-mixed", "cpu", scaler),
    )
    return weights(module), module.scales, [engine.updates for engine in trainer_.strategy.engines]


def test_a_step_by_hand_that_overflows_on_one_rank_is_skipped_on_all() -> None:
    (first, *rest), (second, *other) = run(overflow_on_one_rank, 2)
    assert_same(first, second)
    assert rest == other
    assert rest[0][0] == 1024.0 > rest[0][1]
    assert rest[1] == [3, 3]


class ClipsEachMicroBatch(SmallTransformer):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        last = batch_idx % 2 == 1
        with contextlib.nullcontext() if last else self.trainer.strategy.block_backward_sync():
            self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(self.optimizers(), gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
        if last:
            self.optimizers().step()


class LossWithoutGradientOnOneRank(Adversarial):
    """Clips the first optimizer's gradients, and goes back through another loss before its step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        losses = list(self.losses(batch))
        self.manual_backward(losses[0], retain_graph=True)
        self.clip_gradients(first, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
        self.manual_backward(losses[1] if dist.get_rank() == 0 else losses[1].detach())
        first.step()
        second.step()


def clip_early() -> Any:
    each, _ = fit(Case(), HiFTDDPStrategy(), share(batches_of(Case(), 2)), ClipsEachMicroBatch())
    batches = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    other, trainer_ = fit(Case(), HiFTDDPStrategy(), batches, LossWithoutGradientOnOneRank().double())
    return weights(each), weights(other), [engine.updates for engine in trainer_.strategy.engines]


def test_gradients_that_are_clipped_early_are_averaged_again_with_what_comes_later() -> None:
    (each, other, updates), second = run(clip_early, 2)
    assert_same(each, second[0])
    assert_same(other, second[1])
    assert updates == second[2] == [4, 4]


def channels_last_around_a_layer() -> Any:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        with HiFT(layers, optimizer, HiFTSettings(), ranks=Ranks()) as hift:
            for _ in range(3):
                hidden = torch.ones(1, 3, 4, 4)
                for number, layer in enumerate(layers):
                    hidden = hidden if number == 1 and dist.get_rank() == 1 else layer(hidden)
                if hidden.requires_grad:
                    hidden.square().mean().backward()
                hift.after_backward()
                optimizer.step()
            assert hift.updates == 3
        found.append(weights(layers))
    return found


def test_a_channels_last_layer_that_one_rank_does_not_use_is_averaged() -> None:
    for plain, channels_last in run(channels_last_around_a_layer, 2):
        assert_close(channels_last, plain, 1e-6)


# --- buffers, manual optimization ------------------------------------------------------------------------------------


class Normalized(L.LightningModule):
    """Two layers and a BatchNorm, which computes with what it has gathered if `frozen`."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # ranks begin with different weights
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1)])
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.rand(3, 2).T > 0.5)  # neither contiguous nor of numbers
        self.frozen = frozen
        self.kinds: set[type] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kinds.add(type(self.norm))
        self.norm.train(not self.frozen)
        return self.layers[1](self.norm(self.layers[0](batch))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByHand(HiFTManualMixin, SmallTransformer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.hift_step(super().training_step(batch, batch_idx), accumulate_grad_batches=2, gradient_clip_val=0.1)


def buffers_and_manual() -> Any:
    inputs = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    plain, _ = fit(Case({}, "SGD", "32-true"), HiFTDDPStrategy(), inputs, Normalized())
    synced, _ = fit(Case({}, "SGD", "32-true"), HiFTDDPStrategy(), inputs, Normalized(True), sync_batchnorm=True)
    with _Counts() as counts:
        seen = _NotesCollectives(counts)
        by_hand, _ = fit(Case(), HiFTDDPStrategy(), share(batches_of(Case(), 2)), ByHand(), callbacks=[seen])
    sends = [any(name == "all_reduce" for name, _ in calls) for calls in seen.steps]
    return weights(plain), synced.kinds, type(synced.norm), weights(by_hand), sends


class GoesBackTwice(SmallTransformer):
    def backward(self, loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)
        (0.1 * loss).backward()


class GoesBackTwiceByHand(SmallTransformer):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.backward_of(loss)
        self.optimizers().step()

    def backward_of(self, loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


class GoesBackByItself(GoesBackTwiceByHand):
    def backward_of(self, loss: torch.Tensor) -> None:
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)


def _go_back(module: type[SmallTransformer], update: str) -> str:
    trainer_ = trainer(HiFTDDPStrategy(update=update), devices=2)
    try:
        trainer_.fit(module(), DataLoader(make_batches(2), batch_size=None))
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("update", ["block", "streamed"])
@pytest.mark.parametrize("module", [GoesBackTwice, GoesBackTwiceByHand])
def test_a_second_backward_before_averages_are_taken_is_an_error_on_all(module: Any, update: str) -> None:
    told = run(_go_back, 2, module, update)
    assert all("for the second time before the first has been averaged" in each for each in told)


def test_second_backward_passes_through_lightning_are_averaged() -> None:
    assert run(_go_back, 2, GoesBackByItself, "block") == ["", ""]


def _wrap() -> str:
    model = DistributedDataParallel(nn.Linear(2, 2), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HiFT(model, optimizer, HiFTSettings(update="streamed"))
    with pytest.raises(ConfigurationError) as caught:
        HiFT(model, optimizer, HiFTSettings(update="fused"))
    return str(caught.value)


def _wrap_in_group() -> str:
    trainer_ = trainer(HiFTDDPStrategy(), devices=1, max_steps=1)
    told = []

    class Wraps(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            told.append(_wrap())

    trainer_.callbacks.append(Wraps())
    trainer_.fit(SmallTransformer(), DataLoader(make_batches(1), batch_size=None))
    return told[0]


def test_a_wrapped_model_is_refused_where_gradients_are_used_inside_backward() -> None:
    (told,) = run(_wrap_in_group, 1)
    assert "`update='fused'` uses gradients inside backward, before `DistributedDataParallel` averages them" in told


def test_buffers_and_first_weights_are_those_of_rank_0_and_manual_optimization_sends_once_a_step() -> None:
    first, second = run(buffers_and_manual, 2)
    # the averages of the last batch are each rank's own; the next batch would begin with those of rank 0
    shared = {name for name in first[0] if "running" not in name}
    assert_same({name: first[0][name] for name in shared}, {name: second[0][name] for name in shared})
    drift = (first[0]["norm.running_mean"] - second[0]["norm.running_mean"]).abs().max()
    assert 0 < drift < 0.2
    assert first[1] == second[1] == {nn.SyncBatchNorm}
    assert first[2] is not nn.SyncBatchNorm  # given back
    assert_same(first[3], second[3])
    one, _ = alone(Case(accumulate=2, clip=0.1), batches_of(Case(), 2))
    assert_close(first[3], weights(one), 1e-10)
    assert first[4] == [False, True] * (STEPS // 2)


class GoesOn:
    """The batches, from where a checkpoint says."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.position = batches, 0

    def __iter__(self) -> Any:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def __len__(self) -> int:
        return 10**6  # Lightning fetches a batch ahead where there is no length

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def go_on(case: Case, batches: Any, ckpt_path: Path | None, saved: Path, steps: int) -> Any:
    """Go on from a checkpoint for some steps, and save another; on how many ranks there are."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    given = share(batches) if ranks > 1 else batches
    strategy = HiFTDDPStrategy(**case.strategy) if ranks > 1 else HiFTStrategy()
    module = SmallTransformer(OPTIMIZERS[case.optimizer])
    trainer_ = trainer(
        strategy, precision=case.precision, devices=ranks, max_epochs=-1, max_steps=steps, use_distributed_sampler=False
    )
    trainer_.fit(module, GoesOn(given), ckpt_path=ckpt_path)
    trainer_.save_checkpoint(saved)
    return weights(module)


@pytest.mark.parametrize("name", [pytest.param("AdamW", marks=pytest.mark.slow), "split"])
def test_a_run_goes_on_with_another_number_of_ranks_and_back_again(name: str, tmp_path: Path) -> None:
    case, batches = CASES[name], batches_of(Case(), 2)
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    run(go_on, 2, case, batches, None, paths[0], 3)
    go_on(case, batches, paths[0], paths[1], 6)
    last = run(go_on, 2, case, batches, paths[1], paths[2], STEPS)
    assert_same(last[0], last[1])
    one, one_trainer = alone(case, batches)
    assert_close(last[0], weights(one), 1e-10)
    saved = torch.load(paths[2], weights_only=True)
    assert saved["hift"]["engines"][0]["updates"] == STEPS
    expected = one_trainer.optimizers[0].state_dict()["state"]
    assert saved["optimizer_states"][0]["state"].keys() == expected.keys()
    for key, state in expected.items():
        assert (saved["optimizer_states"][0]["state"][key]["exp_avg"] - state["exp_avg"]).abs().max() < 1e-10


class WithDropout(SmallTransformer):
    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1


def stop_and_go_on(folder: Path) -> Any:
    rank = dist.get_rank()
    results = []
    for max_steps, path in ((STEPS, None), (3, None), (STEPS, folder / "stopped.ckpt")):
        torch.manual_seed(100 * rank + (0 if path is None else 7))  # dropout differs between ranks
        module = WithDropout()
        trainer_ = trainer(
            HiFTDDPStrategy(), devices=2, max_epochs=-1, max_steps=max_steps, use_distributed_sampler=False
        )
        trainer_.fit(module, GoesOn(share(batches_of(Case(), 2))), ckpt_path=path)
        if max_steps == 3:
            trainer_.save_checkpoint(folder / "stopped.ckpt")
        results.append((weights(module), module.losses))
    return results


def test_a_resumed_run_on_as_many_ranks_is_exact_with_each_ranks_random_numbers(tmp_path: Path) -> None:
    for straight, _, resumed in run(stop_and_go_on, 2, tmp_path):
        assert_same(straight[0], resumed[0])
        assert straight[1][3:] == resumed[1]


def killed_in_the_middle(folder: Path) -> None:
    class KillsRank1(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 5 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(
        Case(),
        HiFTDDPStrategy(),
        share(batches_of(Case(), 2)),
        callbacks=[checkpoints, KillsRank1()],
        enable_checkpointing=True,
    )


def test_a_killed_rank_ends_the_others_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 died"):
        run(killed_in_the_middle, 2, tmp_path, timeout=60.0)
    assert time.monotonic() - started < 60
    batches = batches_of(Case(), 2)
    newest = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    resumed = run(go_on, 2, Case(), batches, newest, tmp_path / "end.ckpt", STEPS)
    one, _ = alone(Case(), batches)
    assert_close(resumed[0], weights(one), 1e-10)


class FailsInABatch(SmallTransformer):
    def __init__(self, ranks: set[int]) -> None:
        super().__init__()
        self.ranks = ranks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 5 and dist.get_rank() in self.ranks:
            raise ZeroDivisionError("in a batch")
        return super().training_step(batch, batch_idx)


def failed_in_the_middle(folder: Path, ranks: set[int], arguments: dict[str, Any]) -> None:
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_exception=True)
    fit(
        Case(),
        HiFTDDPStrategy(**arguments),
        share(batches_of(Case(), 2)),
        FailsInABatch(ranks),
        callbacks=[checkpoints],
        enable_checkpointing=True,
    )


@pytest.mark.parametrize(
    ("ranks", "arguments", "saved"),
    [
        ({0, 1}, {}, [2, 4, 5]),
        ({0, 1}, {"shard_parked_state": True}, [2, 4, 5]),
        pytest.param({0}, {}, [2, 4, 5], marks=pytest.mark.slow),
        pytest.param({0}, {"shard_parked_state": True}, [2, 4], marks=pytest.mark.slow),
    ],
)
def test_ranks_that_fail_end_with_their_error_and_save_what_is_whole(
    ranks: set[int], arguments: dict[str, Any], saved: list[int], tmp_path: Path
) -> None:
    # of a rank that fails alone the others may tell first
    with pytest.raises(RankError, match="in a batch" if len(ranks) == 2 else "in a batch|Connection closed"):
        run(failed_in_the_middle, 2, tmp_path, ranks, arguments)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={step}.ckpt" for step in saved]
    end = tmp_path / "end.ckpt"
    resumed = run(go_on, 2, Case(arguments), batches_of(Case(), 2), tmp_path / f"step={saved[-1]}.ckpt", end, STEPS)
    assert_close(resumed[0], weights(alone(Case(), batches_of(Case(), 2))[0]), 1e-10)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"static_graph": True}, "the graph is not static"),
        ({"gradient_as_bucket_view": True}, "no bucket outlives it"),
        ({"find_unused_parameters": True}, "found out in each step"),
        ({"ddp_comm_hook": copy.copy}, "one fixed set of parameters"),
        ({"model_averaging_period": 2}, "averaged in each step"),
        ({"gruop_size": 2}, "`HiFTDDPStrategy\\(gruop_size=2\\)`"),
    ],
)
def test_arguments_that_assume_the_wrapper_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(MisconfigurationException, match=told):
        HiFTDDPStrategy(**arguments)


def test_a_bucket_of_no_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`bucket_cap_mb=0` must be above 0"):
        HiFTDDPStrategy(bucket_cap_mb=0)


class Together(torch.optim.SGD):
    """Steps by the norm of all gradients, so no parameter is stepped by itself."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad / norm, alpha=group["lr"])
        return loss


def refused_while_fitting() -> list[str]:
    told = []
    batches = share(batches_of(Case(), 2))
    wrapped = SmallTransformer()
    wrapped.head = DistributedDataParallel(wrapped.head)  # type: ignore[assignment]
    sparse = SmallTransformer()
    sparse.embedding.sparse = True
    clipped = dataclasses.replace(Case(), clip=1.0)
    for case, strategy, module in (
        (Case(), HiFTDDPStrategy(), wrapped),
        (Case(), HiFTDDPStrategy(), sparse),
        (clipped, HiFTDDPStrategy(update="fused"), SmallTransformer()),
        (Case(), HiFTDDPStrategy(shard_parked_state=True), SmallTransformer(lambda p: Together(p, lr=0.1))),
    ):
        try:
            fit(case, strategy, batches, module)
        except (MisconfigurationException, ConfigurationError) as error:
            told.append(str(error))
    return told


def test_modules_and_optimizers_that_do_not_go_with_it_are_refused() -> None:
    for told in run(refused_while_fitting, 2):
        assert "`SmallTransformer.head` is wrapped in `DistributedDataParallel`" in told[0]
        assert "has a sparse gradient" in told[1]
        assert "`update='fused'` frees each gradient inside backward" in told[2]
        assert "could not be shown to treat parameters one by one" in told[3]


def _waits_in_host_memory():
    group = dist.new_group(backend="cpu:gloo,cuda:gloo", use_local_synchronization=True)
    ranks = Ranks(group)
    dist.monitored_barrier(ranks.host_group)
    return ranks.host_group is group, Ranks().host_group is dist.group.WORLD


def test_of_a_group_of_several_backends_one_is_made_for_host_memory():
    assert run(_waits_in_host_memory, 2) == [(False, True)] * 2
