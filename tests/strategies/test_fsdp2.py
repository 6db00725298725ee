"""`hift_fsdp2` on two and four ranks equals one process at the batch of all of them, and sends no more than it must."""

import gc
import json
import re
import time
import warnings

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hift_lightning import HiFT, HiFTFSDP2Strategy, HiFTManualMixin, HiFTStrategy
from hift_lightning.callbacks import ChangedParameters
from hift_lightning.engine.errors import ConfigurationError, NonfiniteError
from tests.blocks_seen import layer_of
from tests.engine.test_state_tensors import Momentum8bit
from tests.processes import run
from tests.small_transformer import CLASSES, VOCABULARY, WIDTH, SmallTransformer, loader, make_batches, trainer

STEPS = 8  # two cycles of four blocks

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * (p.dim() > 1)} for p in parameters], lr=1e-2
    ),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


class LooseAndTied(L.LightningModule):
    """A head tied to the embedding, a parameter of its own with one row, and a layer with fewer rows than ranks."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.make_optimizer = make_optimizer
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 1), nn.Linear(1, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.losses = []

    def scores(self, hidden):
        return self.head(hidden)

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        loss = nn.functional.cross_entropy(self.scores(hidden * self.scale).mean(1), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class WithoutStack(SmallTransformer):
    """No list of layers: each module of torch is one, and attention with its parts too."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer, depth=0)
        torch.manual_seed(5)
        self.layers = None
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden, _ = self.attention(hidden, hidden, hidden)
        hidden, _ = self.recurrent(hidden)
        return self.head(self.norm(hidden).mean(1))


class WithUnused(LooseAndTied):
    """Has a layer that takes no part in the loss, so that no backward pass follows when it has its turn."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.extra = nn.Linear(WIDTH, WIDTH)


class Unit(nn.Embedding):
    """The gradient of its rows depends on its weights."""

    def forward(self, tokens):
        return nn.functional.embedding(tokens, self.weight / self.weight.norm(dim=1, keepdim=True))


class WithUnitEmbedding(SmallTransformer):
    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        torch.manual_seed(5)
        self.embedding = Unit(VOCABULARY, WIDTH)


MODELS = {
    "small": SmallTransformer,
    "loose": LooseAndTied,
    "without stack": WithoutStack,
    "unused": WithUnused,
    "unit embedding": WithUnitEmbedding,
}


def fit(
    strategy, batches, model="small", optimizer="adamw", dtype=torch.float32, callbacks=(), ckpt_path=None, **arguments
):
    module = MODELS[model](OPTIMIZERS[optimizer]).to(dtype)
    trainer_ = trainer(
        strategy, callbacks=list(callbacks), use_distributed_sampler=False, num_sanity_val_steps=0, **arguments
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*does not have many workers|.*isinstance.treespec|.*blocks will not|.*no `val_|No grad"
        )
        trainer_.fit(module, loader(batches), ckpt_path=ckpt_path)
    return module, trainer_


def of_this_rank(batches):
    return batches[dist.get_rank() :: dist.get_world_size()]


def of_all_ranks(batches, ranks):
    groups = [batches[i : i + ranks] for i in range(0, len(batches), ranks)]
    return [tuple(map(torch.cat, zip(*group, strict=True))) for group in groups]


def whole(module):
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in module.state_dict().items()}


def distance(left, right):
    return max((left[name] - right[name]).abs().max().item() for name in right)


# --- equality with one process ------------------------------------------------------------------------------------

DOUBLE = {"dtype": torch.float64}
CASES = {
    "sgd": ({}, {"optimizer": "sgd"}, 1e-6),
    "adamw": ({}, DOUBLE, 1e-10),
    # a parked dtype has state copied on a CPU too, so that pieces are cut
    "streamed": (
        {"update": "streamed", "window": 3072, "parked_dtype": "float32"},
        {"model": "loose", "optimizer": "momentum"},
        1e-6,
    ),
    "state in files": ({"offload": "files"}, {**DOUBLE, "model": "loose"}, 1e-10),
    "fused": ({"update": "fused"}, DOUBLE, 1e-10),
    "fused, clipped by value": ({"update": "fused"}, {**DOUBLE, "gradient_clip_val": 0.01, "clip": "value"}, 1e-10),
    "two layers a block": ({"group_size": 2, "order": "bottom2up"}, DOUBLE, 1e-10),
    "always active": ({"always_active": ["head.*"]}, {**DOUBLE, "gradient_clip_val": 0.3}, 1e-10),
    "steps per block": ({"steps_per_block": 2}, DOUBLE, 1e-10),
    "clipped by norm": ({}, {**DOUBLE, "gradient_clip_val": 0.3}, 1e-10),
    "clipped by value": ({}, {**DOUBLE, "gradient_clip_val": 0.01, "clip": "value"}, 1e-10),
    "accumulation": ({}, {**DOUBLE, "accumulate_grad_batches": 2}, 1e-10),
    "activation checkpointing": ({"activation_checkpointing": True}, DOUBLE, 1e-10),
    "state built early": ({}, {**DOUBLE, "optimizer": "adagrad"}, 1e-8),  # its first step is the sign of a gradient
    "param groups": ({}, {**DOUBLE, "optimizer": "groups"}, 1e-10),
    "loose and tied": ({}, {**DOUBLE, "model": "loose"}, 1e-10),
    "loose and tied, sgd": ({}, {"model": "loose", "optimizer": "sgd"}, 1e-6),
    "without a stack": ({}, {**DOUBLE, "model": "without stack"}, 1e-10),
    "a layer without use": ({"order": "bottom2up"}, {**DOUBLE, "model": "unused"}, 1e-10),
    "a layer without use, 2 steps": (
        {"order": "bottom2up", "steps_per_block": 2},
        {**DOUBLE, "model": "unused"},
        1e-10,
    ),
    "rows depend on weights": ({}, {**DOUBLE, "model": "unit embedding"}, 1e-10),
    "state stays on the device": ({"offload": "none"}, DOUBLE, 1e-10),
    "weights in host memory": ({"offload_params": True}, DOUBLE, 1e-10),
    "computed in bf16": ({"mp_policy": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}}, {}, 5e-2),
    "masters": (
        {"master_weights": True, "mp_policy": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}},
        {"precision": "bf16-true"},
        5e-2,
    ),
    "masters, weights in host memory": (
        {"master_weights": True, "offload_params": True, "update": "streamed", "activation_checkpointing": True},
        {"precision": "bf16-true"},
        5e-2,
    ),
}


def arguments_of(case, folder):
    settings, arguments, _ = CASES[case]
    arguments = dict(arguments)
    if settings.get("offload") == "files":
        settings = {**settings, "offload": folder}
    if "clip" in arguments:
        arguments["gradient_clip_algorithm"] = arguments.pop("clip")
    return settings, arguments


def _train_all(cases, folder):
    results = {}
    for case in cases:
        settings, arguments = arguments_of(case, folder)
        batches = of_this_rank(make_batches(STEPS * dist.get_world_size()))
        module, trainer_ = fit(HiFTFSDP2Strategy(**settings), batches, devices=dist.get_world_size(), **arguments)
        assert all(isinstance(p, DTensor) for p in module.parameters())
        results[case] = whole(module), trainer_.strategy.hift.plan.fingerprint(), trainer_.strategy.hift.updates
    return results


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, list(CASES)[:9]), (2, list(CASES)[9:]), (4, ["adamw", "loose and tied", "state in files"])]
)
def test_it_equals_one_process_at_the_batch_of_all_ranks(ranks, cases, tmp_path):
    results = run(_train_all, ranks, cases, tmp_path)
    for case in cases:
        settings, arguments = arguments_of(case, tmp_path)
        batches = of_all_ranks(make_batches(STEPS * ranks), ranks)
        settings = {key: value for key, value in settings.items() if key not in ("mp_policy", "offload_params")}
        module, trainer_ = fit(HiFTStrategy(**settings), batches, **arguments)
        weights, fingerprint, updates = results[0][case]
        assert distance(weights, module.state_dict()) < CASES[case][2], case
        assert (fingerprint, updates) == (trainer_.strategy.hift.plan.fingerprint(), trainer_.strategy.hift.updates), (
            case
        )
        assert all(distance(weights, result[case][0]) == 0 for result in results), case


class NotesAverages(SmallTransformer):
    """Notes BatchNorm's running average before each step."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.averages = []

    def forward(self, tokens):
        self.averages.append(self.batch_norm.running_mean.clone())
        return self.head(self.batch_norm(self.norm(self.embedding(tokens).mean(1))))


MODELS["averages"] = NotesAverages


def _gather_averages():
    module, _ = fit(HiFTFSDP2Strategy(), of_this_rank(make_batches(2 * STEPS)), "averages", devices=2)
    return module.averages


def test_running_averages_are_those_of_the_first_rank_at_each_batch():
    first, second = run(_gather_averages, 2)
    assert len(first) == STEPS
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[1], first[2])


def _train_in_a_plain_loop():
    module = SmallTransformer(OPTIMIZERS["adamw"]).double()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*module.layers, module):
        fully_shard(part, mesh=mesh)
    optimizer = module.configure_optimizers()
    with HiFT(module, optimizer) as hift:
        for tokens, labels in of_this_rank(make_batches(2 * STEPS)):
            loss = nn.functional.cross_entropy(module(tokens), labels)
            loss.backward()
            hift.after_backward(loss)
            nn.utils.clip_grad_norm_(module.parameters(), 0.3)
            optimizer.step()
    return whole(module)


def test_a_plain_loop_over_a_sharded_module_equals_it_too():
    module, _ = fit(
        HiFTStrategy(), of_all_ranks(make_batches(2 * STEPS), 2), dtype=torch.float64, gradient_clip_val=0.3
    )
    for weights in run(_train_in_a_plain_loop, 2):
        assert distance(weights, module.state_dict()) < 1e-10


# --- what is sent, and what is whole --------------------------------------------------------------------------------


class Sent(Callback):
    """For each step the elements that were gathered in forward, in backward, and reduced, and the whole parameters."""

    def __init__(self):
        self.steps = []
        for name in ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor"):
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name, collective):
        def counting(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            in_backward = torch._C._current_graph_task_id() != -1
            kind = "reduced" if "reduce" in name else "backward" if in_backward else "forward"
            if self.steps:
                self.steps[-1].setdefault(kind, []).append(max(tensor.numel() for tensor in tensors))
            return collective(*args, **kwargs)

        return counting

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append({"whole": []})

    def on_train_start(self, trainer, pl_module):
        for layer in pl_module.layers:
            layer.linear1.register_forward_hook(lambda *_: self._see_whole(pl_module))

    def _see_whole(self, module):
        names = (name for name, p in module.named_parameters() if not isinstance(p, DTensor))
        self.steps[-1]["whole"].append({layer_of(name) for name in names})


DEPTH = 4
MODELS["deep"] = lambda make: SmallTransformer(make, depth=DEPTH)


def _count():
    sent = Sent()
    module, trainer_ = fit(
        HiFTFSDP2Strategy(),
        of_this_rank(make_batches(2 * 2 * (DEPTH + 2))),
        model="deep",
        devices=2,
        callbacks=[sent],
    )
    blocks = [[padded(module.get_parameter(name)) for name in b.parameters] for b in trainer_.strategy.hift.plan.blocks]
    return sent.steps, [sum(block) for block in blocks], padded(module.norm.weight) + padded(module.norm.bias)


def padded(parameter):
    ranks = parameter.device_mesh.size()
    return -(-parameter.shape[0] // ranks) * ranks * parameter[0].numel()


def test_only_the_active_block_is_reduced_and_nothing_below_it_is_gathered_in_backward():
    steps, blocks, loose = run(_count, 2)[0]
    top_down = list(reversed(range(len(blocks))))
    assert len(steps) == 2 * len(blocks)
    for step, active in zip(steps, top_down * 2, strict=True):
        assert sum(step["reduced"]) == blocks[active]
        # the final norm is the module's own, and is gathered again for backward
        assert sorted(step["forward"]) == sorted([*blocks[:-1], blocks[-1] - loose, loose])
        above = [loose, blocks[-1] - loose, *reversed(blocks[max(active, 1) : -1])]
        assert step["backward"] == above  # an embedding's gradient does not depend on its weights
        assert step["whole"] == [{f"layers.{i}", "head"} for i in range(DEPTH)]


# --- memory ---------------------------------------------------------------------------------------------------------


class Tall(L.LightningModule):
    """24 layers with weights of 32 KiB each, and activations that count for nothing."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(24))
        self.head = nn.Linear(64, CLASSES)

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        hidden = nn.functional.one_hot(tokens, 64).float().mean(1)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return nn.functional.cross_entropy(self.head(hidden), labels)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


MODELS["tall"] = Tall


class LiveBytes(Callback):
    """Most bytes of tensors that live at once, as seen in forward and in backward of three layers."""

    STEPS = (0, 12, 24)  # the head, a layer in the middle, and the lowest one

    def __init__(self):
        self.peak = 0
        self._looks = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._looks = batch_idx in self.STEPS

    def on_train_start(self, trainer, pl_module):
        for layer in (pl_module.layers[i] for i in (0, 12, 23)):
            layer[1].register_forward_hook(self._look)
            layer[1].register_full_backward_hook(self._look)

    def _look(self, *_):
        if self._looks and _live_bytes() > self.peak:
            # on a busy machine gloo's threads hold a finished collective's tensors for a moment longer, so what is
            # there for good is the least of several looks
            self.peak = max(self.peak, min(_live_bytes(after=0.03) for _ in range(10)))


def _live_bytes(after=0.0):
    time.sleep(after)
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def _peak():
    live = LiveBytes()
    batches = of_this_rank(make_batches(dist.get_world_size() * 25, size=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned a view tensor|Full backward hook is firing")
        # an optimizer without state, which would be parked in the same memory here
        fit(HiFTFSDP2Strategy(), batches, "tall", "sgd", devices=dist.get_world_size(), callbacks=[live])
    return live.peak


def test_a_rank_holds_its_shards_and_a_few_layers():
    model = Tall(None)
    weights = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    for peak in run(_peak, 4):
        # in backward one layer is whole, and the one below has been gathered or the active one's gradients are there
        assert weights / 4 < peak < weights / 4 + 2.5 * layer < 0.4 * weights


# --- what is not finite ---------------------------------------------------------------------------------------------


class NotFinite(SmallTransformer):
    """On one rank the loss, or the gradient of one row of the embedding, is NaN in the third batch."""

    def __init__(self, make_optimizer, where):
        super().__init__(make_optimizer)
        self.where = where

    def training_step(self, batch, batch_idx):
        self.at_fault = batch_idx == 2 and dist.get_rank() == 1
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.at_fault and self.where == "loss" else loss

    def forward(self, tokens):
        def poison(module, args, output):
            nothing = torch.zeros_like(output)
            nothing[0, 0] = torch.nan
            output.register_hook(lambda gradient: gradient + nothing)

        if not (self.at_fault and self.where == "gradient"):
            return super().forward(tokens)
        with self.embedding.register_forward_hook(poison):
            return super().forward(tokens)


MODELS["nan in loss"] = lambda make: NotFinite(make, "loss")
MODELS["nan in gradient"] = lambda make: NotFinite(make, "gradient")


def _meet_nan():
    results = {}
    for where in ("loss", "gradient"):
        model, batches = f"nan in {where}", of_this_rank(make_batches(2 * 6))
        settings = {"steps_per_block": 3, "order": "bottom2up"}  # the third batch is the embedding's
        with pytest.raises(NonfiniteError) as caught:
            fit(HiFTFSDP2Strategy(**settings), batches, model, devices=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A step is left out")
            skipped, trainer_ = fit(HiFTFSDP2Strategy(nonfinite="skip", **settings), batches, model, devices=2)
        del batches[2]
        without, _ = fit(HiFTFSDP2Strategy(**settings), batches, devices=2)
        results[where] = str(caught.value), trainer_.strategy.hift.skipped_steps, whole(skipped), whole(without)
    return results


def test_all_ranks_raise_or_skip_together():
    for result in run(_meet_nan, 2):
        for where, (told, skips, skipped, without) in result.items():
            what = "The loss" if where == "loss" else "The gradient of `embedding.weight`"
            assert told.startswith(f"{what} has NaN in update 3")
            assert skips == 1
            assert distance(skipped, without) == 0


# --- weights that are used without their module ---------------------------------------------------------------------


class UsesWeights(LooseAndTied):
    """The head is a product with the embedding's weights, and no module."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        del self.head

    def scores(self, hidden):
        return hidden @ self.embedding.weight.T


class TwoOptimizers(HiFTManualMixin, SmallTransformer):
    def configure_optimizers(self):
        self.automatic_optimization = False
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.embedding, self.head)]


MODELS |= {"weights": UsesWeights, "two": TwoOptimizers}


def _use_weights():
    with pytest.raises(RuntimeError, match="mixed") as caught:
        fit(HiFTFSDP2Strategy(), make_batches(1), "weights", devices=2)
    with pytest.raises(ConfigurationError, match="`embeddings` in `whole` matches no module"):
        fit(HiFTFSDP2Strategy(whole=["embeddings"]), make_batches(1), "weights", devices=2)
    batches = of_this_rank(make_batches(2 * STEPS))
    module, _ = fit(HiFTFSDP2Strategy(whole=["embedding"]), batches, "weights", dtype=torch.float64, devices=2)
    return caught.value.__notes__, whole(module)


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="before 3.11 it is a warning")
def test_weights_that_are_used_without_their_module_can_be_gathered_at_the_start():
    [notes, weights], _ = run(_use_weights, 2)
    assert any("HiFTFSDP2Strategy(whole=[...])" in note for note in notes)
    module, _ = fit(HiFTStrategy(), of_all_ranks(make_batches(2 * STEPS), 2), "weights", dtype=torch.float64)
    assert distance(weights, module.state_dict()) < 1e-10


# --- before, after and between fits ---------------------------------------------------------------------------------


class Manual(HiFTManualMixin, SmallTransformer):
    """Optimizes by hand, with the mixin's windows of two batches."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.hift_step(self.loss(batch), accumulate_grad_batches=2, gradient_clip_val=0.5)


MODELS["manual"] = Manual


def _live():
    ranks = {"devices": 2, "use_distributed_sampler": False, "num_sanity_val_steps": 1}
    torch.manual_seed(dist.get_rank())
    module = SmallTransformer()
    nn.init.normal_(module.embedding.weight)  # differs from rank to rank
    tests = loader(make_batches(3, seed=4))
    told = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*isinstance.treespec|.*recommended to")
        trainer_ = trainer(HiFTFSDP2Strategy(), **ranks)
        before = whole_later(module)
        told.append(trainer_.validate(module, tests, verbose=False)[0]["val_loss"])
        before = before()
        with torch.inference_mode():  # as Lightning evaluates but on gloo
            module(make_batches(1)[0][0])
        trainer_.fit(module, loader(of_this_rank(make_batches(8))), tests)
        told.append(trainer_.test(module, tests, verbose=False)[0]["val_loss"])
        trained = whole(module)
        trainer(HiFTFSDP2Strategy(order="bottom2up"), **ranks).fit(
            module, loader(of_this_rank(make_batches(8, seed=1))), tests
        )
        predicted = trainer_.predict(module, loader([tokens for tokens, _ in make_batches(1, seed=4)]))
        assert all(p.requires_grad for p in module.parameters())
        fails, batches = trainer(HiFTFSDP2Strategy(), **ranks), loader(of_this_rank(make_batches(8)))
        with module.layers[1].linear2.register_forward_hook(_fail), pytest.raises(ValueError, match="in the middle"):
            fails.fit(module, batches)
        assert told[-1] != trainer_.test(module, tests, verbose=False)[0]["val_loss"]
        manual, _ = fit(
            HiFTFSDP2Strategy(), of_this_rank(make_batches(16)), "manual", "adamw", torch.float64, devices=2
        )
    return before, trained, whole(module), told, predicted[0], whole(manual)


def _fail(*_):
    raise ValueError("in the middle of a forward pass")


def whole_later(module):
    return lambda: {name: value.clone() for name, value in whole(module).items()}


def test_it_tests_and_predicts_and_fits_again():
    results = run(_live, 2)
    before, trained, again, told, predicted, manual = results[0]
    assert all(
        distance(weights, other) == 0
        for result in results
        for weights, other in zip((before, trained, again, manual), (*result[:3], result[5]), strict=True)
    )
    assert told == results[1][3]
    single = SmallTransformer()
    single.load_state_dict(before)
    tests = loader(make_batches(3, seed=4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*isinstance.treespec|.*no `val_")
        trainer_ = trainer("hift")
        assert told[0] == pytest.approx(trainer_.validate(single, tests, verbose=False)[0]["val_loss"], abs=1e-6)
        single.load_state_dict(trained)
        assert told[1] == pytest.approx(trainer_.test(single, tests, verbose=False)[0]["val_loss"], abs=1e-6)
        single.load_state_dict(again)
        assert torch.allclose(predicted, single.eval()(make_batches(1, seed=4)[0][0]), atol=1e-6)
        by_hand, _ = fit(HiFTStrategy(), of_all_ranks(make_batches(16), 2), "manual", "adamw", torch.float64)
    assert distance(manual, by_hand.state_dict()) < 1e-10


def _validate_then_train(folder):
    told = []
    for strategy in (HiFTFSDP2Strategy(master_weights=True, mp_policy=HALF), HiFTFSDP2Strategy(mp_policy=HALF)):
        module = SmallTransformer(OPTIMIZERS["adamw"])
        path = folder / f"changed-{dist.get_rank()}.json"
        trainer_ = trainer(strategy, devices=2, precision="bf16-true", max_steps=2, callbacks=[ChangedParameters(path)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_.validate(module, loader(make_batches(1)), verbose=False)
            trainer_.fit(module, loader(make_batches(4)))
        told.append([str(each.message) for each in caught if "masters are made of the rounded" in str(each.message)])
    told.append(_told_where_a_run_goes_on(folder))
    return told, json.loads(path.read_text()) if path.exists() else None


def _told_where_a_run_goes_on(folder):
    def make(**more):
        strategy = HiFTFSDP2Strategy(master_weights=True, mp_policy=HALF)
        return trainer(strategy, devices=2, precision="bf16-true", **more)

    first = make(max_steps=1)
    first.fit(SmallTransformer(OPTIMIZERS["adamw"]), loader(make_batches(4)))
    first.save_checkpoint(folder / "first.ckpt")
    module, second = SmallTransformer(OPTIMIZERS["adamw"]), make(max_steps=2, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.validate(module, loader(make_batches(1)), verbose=False)
        second.fit(module, loader(make_batches(4)), ckpt_path=folder / "first.ckpt")
    return [each for each in caught if "masters are made of the rounded" in str(each.message)]


HALF = {"param_dtype": "bfloat16", "reduce_dtype": "float32"}


def test_masters_of_rounded_weights_are_warned_of_and_changes_are_told_by_the_first_rank(tmp_path):
    (first, changed), (_, of_second) = run(_validate_then_train, 2, tmp_path)
    assert [len(told) for told in first] == [1, 0, 0]
    assert "weights of `SmallTransformer`" in first[0][0]
    assert of_second is None
    assert [step["changed_outside_the_block"] for step in changed] == [[], []]
    assert all(step["changed"] for step in changed)


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"tensor_parallel_size": 2}, "`tensor_parallel_size=2`.*leave it at 1"),
        ({"group_size": "auto", "memory_budget": "1GiB"}, "`group_size='auto'`.*give `group_size` a number"),
        ({"mp_policy": {"param_dtype": "bf16"}}, "`mp_policy.param_dtype='bf16'`.*like `bfloat16`"),
        ({"mp_policy": {"params": "bfloat16"}}, "`mp_policy` has no `params`"),
    ],
)
def test_it_refuses_arguments(arguments, told):
    with pytest.raises(ConfigurationError, match=told):
        HiFTFSDP2Strategy(**arguments)


class ShardsItself(SmallTransformer):
    def configure_model(self):
        fully_shard(self.layers[0], mesh=self.device_mesh["data_parallel"])


class WithoutValues(SmallTransformer):
    def configure_model(self):
        self.head = nn.Linear(WIDTH, CLASSES, device="meta")


class WithAScalar(SmallTransformer):
    def configure_model(self):
        self.scale = nn.Parameter(torch.ones(()))


class WithALargeMatrix(SmallTransformer):
    def configure_model(self):
        self.large = nn.Linear(128, 128)


class WithTwoDtypes(SmallTransformer):
    def configure_model(self):
        self.layers[1].norm1.bfloat16()


MODELS |= {
    "dtypes": WithTwoDtypes,
    "sharded": ShardsItself,
    "meta": WithoutValues,
    "scalar": WithAScalar,
    "large": WithALargeMatrix,
}
OPTIMIZERS |= {"8 bit": lambda parameters: Momentum8bit(parameters, least=4096)}
REFUSED = {
    "sharded": ({}, {}, "`fully_shard` has been called on `ShardsItself.layers.0`"),
    "meta": ({}, {}, "`head.weight` of `WithoutValues` has no values yet"),
    "scalar": ({}, {}, "`scale` of `WithAScalar` has no dimension"),
    "dtypes": ({}, {}, r"`TransformerEncoderLayer` is gathered at once.*weight` torch.float32 and .*norm1.*bfloat16"),
    "small": ({}, {"optimizer": "adafactor"}, "`Adafactor` does not treat each element.*`strategy='hift_ddp'`"),
    "large": ({}, {"optimizer": "8 bit"}, "`Momentum8bit` does not treat each element"),
    "two": ({}, {}, "There are 2 optimizers.*use `strategy='hift_ddp'`"),
    "loose": ({"data_parallel_size": 1}, {}, "`data_parallel_size=1` is not the number of devices, 2"),
}


def _refused():
    told = {}
    with pytest.raises(ConfigurationError, match="precision='16-mixed'.*use `precision='bf16-mixed'`"):
        fit(HiFTFSDP2Strategy(), make_batches(1), devices=2, plugins=[MixedPrecision("16-mixed", "cpu")])
    for callback in (StochasticWeightAveraging(0.1), WeightAveraging()):
        with pytest.raises(MisconfigurationException, match=f"`{type(callback).__name__}` copies the module before"):
            fit(HiFTFSDP2Strategy(), make_batches(1), devices=2, callbacks=[callback])
    for model, (settings, arguments, _) in REFUSED.items():
        with pytest.raises(ConfigurationError) as caught:
            fit(HiFTFSDP2Strategy(**settings), make_batches(1), model, devices=2, **arguments)
        told[model] = str(caught.value)
    return told


def test_it_refuses_modules_and_optimizers():
    for told in run(_refused, 2):
        for model, (_, _, pattern) in REFUSED.items():
            assert re.search(pattern, told[model]), told[model]


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        ({}, "nccl"),
        ({"offload_params": True}, "cpu:gloo,cuda:nccl"),
        ({"offload_params": True, "process_group_backend": "nccl"}, "nccl"),
    ],
)
def test_gradients_in_host_memory_have_a_backend_that_adds_them_up(arguments, backend):
    strategy = HiFTFSDP2Strategy(**arguments)
    strategy.parallel_devices = [torch.device("cuda", 0)]
    strategy.cluster_environment = LightningEnvironment()
    assert strategy._get_process_group_backend() == backend
