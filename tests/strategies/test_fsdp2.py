"""`hift_fsdp2` on two and four ranks equals one process at the batch of all of them, and sends no more than it must."""

import warnings

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.tensor import DTensor

from hift_lightning import HiFTFSDP2Strategy, HiFTStrategy
from tests.blocks_seen import layer_of
from tests.processes import run
from tests.small_transformer import VOCABULARY, WIDTH, SmallTransformer, loader, make_batches, trainer

STEPS = 8  # two cycles of four blocks

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
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

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        loss = nn.functional.cross_entropy(self.head(hidden * self.scale).mean(1), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


MODELS = {"small": SmallTransformer, "loose": LooseAndTied}


def fit(
    strategy, batches, model="small", optimizer="adamw", dtype=torch.float32, callbacks=(), ckpt_path=None, **arguments
):
    module = MODELS[model](OPTIMIZERS[optimizer]).to(dtype)
    trainer_ = trainer(
        strategy, callbacks=list(callbacks), use_distributed_sampler=False, num_sanity_val_steps=0, **arguments
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*does not have many workers|.*isinstance.treespec|.*blocks will not|.*no `val_"
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
    "streamed": ({"update": "streamed", "window": 4096, "parked_dtype": "float32"}, {}, 5e-2),
    "fused": ({"update": "fused"}, DOUBLE, 1e-10),
    "fused, clipped by value": ({"update": "fused"}, {**DOUBLE, "gradient_clip_val": 0.01, "clip": "value"}, 1e-10),
    "two layers a block": ({"group_size": 2, "order": "bottom2up"}, DOUBLE, 1e-10),
    "steps per block": ({"steps_per_block": 2}, DOUBLE, 1e-10),
    "clipped by norm": ({}, {**DOUBLE, "gradient_clip_val": 0.3}, 1e-10),
    "clipped by value": ({}, {**DOUBLE, "gradient_clip_val": 0.01, "clip": "value"}, 1e-10),
    "accumulation": ({}, {**DOUBLE, "accumulate_grad_batches": 2}, 1e-10),
    "activation checkpointing": ({"activation_checkpointing": True}, DOUBLE, 1e-10),
    "state built early": ({}, {**DOUBLE, "optimizer": "adagrad"}, 1e-8),  # its first step is the sign of a gradient
    "param groups": ({}, {**DOUBLE, "optimizer": "groups"}, 1e-10),
    "loose and tied": ({}, {**DOUBLE, "model": "loose"}, 1e-10),
    "loose and tied, sgd": ({}, {"model": "loose", "optimizer": "sgd"}, 1e-6),
    "state stays on the device": ({"offload": "none"}, DOUBLE, 1e-10),
}


def arguments_of(case):
    settings, arguments, _ = CASES[case]
    arguments = dict(arguments)
    if "clip" in arguments:
        arguments["gradient_clip_algorithm"] = arguments.pop("clip")
    return settings, arguments


def _train_all(cases):
    results = {}
    for case in cases:
        settings, arguments = arguments_of(case)
        batches = of_this_rank(make_batches(STEPS * dist.get_world_size()))
        module, trainer_ = fit(HiFTFSDP2Strategy(**settings), batches, devices=dist.get_world_size(), **arguments)
        assert all(isinstance(p, DTensor) for p in module.parameters())
        results[case] = whole(module), trainer_.strategy.hift.plan.fingerprint(), trainer_.strategy.hift.updates
    return results


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, list(CASES)[:8]), (2, list(CASES)[8:]), (4, ["adamw", "loose and tied"])]
)
def test_it_equals_one_process_at_the_batch_of_all_ranks(ranks, cases):
    results = run(_train_all, ranks, cases)
    for case in cases:
        settings, arguments = arguments_of(case)
        batches = of_all_ranks(make_batches(STEPS * ranks), ranks)
        module, trainer_ = fit(HiFTStrategy(**settings), batches, **arguments)
        weights, fingerprint, updates = results[0][case]
        assert distance(weights, module.state_dict()) < CASES[case][2], case
        assert (fingerprint, updates) == (trainer_.strategy.hift.plan.fingerprint(), trainer_.strategy.hift.updates), (
            case
        )
        assert all(distance(weights, result[case][0]) == 0 for result in results), case


# --- what is sent, and what is whole --------------------------------------------------------------------------------


class Sent(Callback):
    """For each step the elements that were gathered in forward, in backward, and reduced, and the whole parameters."""

    def __init__(self):
        self.steps = []
        for name in ("all_gather_single", "reduce_scatter_single"):
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
