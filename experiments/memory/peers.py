"""Other ways to train with less memory, each as its documentation says, in a plain loop.

BAdam, GaLore, APOLLO, Adam-mini, LOMO and LoRA are the packages from PyPI as they are; LISA, which is no package, is
written after its paper.
"""

import contextlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from experiments.memory.task import LEARNING_RATE
from hift_lightning.engine.partition import partition


def _nothing() -> None:
    pass


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Peer:
    """What a method does in each phase of a step."""

    model: nn.Module
    update: Callable[[], None] = _nothing
    backward: Callable[[Tensor], None] = _backward
    begin: Callable[[], None] = _nothing


def _with(optimizer: torch.optim.Optimizer, model: nn.Module, begin: Callable[[], None] = _nothing) -> Peer:
    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Peer(model, update, begin=begin)


def full(model: LlamaForCausalLM) -> Peer:
    return _with(AdamW(model.parameters(), lr=LEARNING_RATE), model)


def step_in_backward(model: LlamaForCausalLM) -> Peer:
    """https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html."""
    optimizers = {p: AdamW([p], lr=LEARNING_RATE) for p in model.parameters()}

    def hook(parameter: Tensor) -> None:
        optimizer = optimizers[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return Peer(model)


def lisa(model: LlamaForCausalLM) -> Peer:
    """https://arxiv.org/abs/2403.17919, algorithm 1: 2 layers drawn anew each step; embeddings and head in each."""
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    draw = random.Random(1)

    def choose_layers() -> None:
        layers = model.model.layers
        layers.requires_grad_(False)
        for layer in draw.sample(list(layers), 2):
            layer.requires_grad_(True)

    return _with(optimizer, model, begin=choose_layers)


def badam(model: LlamaForCausalLM) -> Peer:
    from badam import BlockOptimizer

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the block at every switch
        optimizer = BlockOptimizer(
            base_optimizer=AdamW(model.parameters(), lr=LEARNING_RATE),
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=1,
            switch_mode="descending",
            include_embedding=True,
            include_lm_head=True,
        )

    def update() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.step()
        optimizer.zero_grad()

    return Peer(model, update)


def _matrices_of_layers(model: LlamaForCausalLM) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of attention and MLP, which are projected, and all others."""
    chosen = {name: ".self_attn." in name or ".mlp." in name for name, _ in model.named_parameters()}
    projected = [p for name, p in model.named_parameters() if chosen[name]]
    return projected, [p for name, p in model.named_parameters() if not chosen[name]]


def galore(model: LlamaForCausalLM) -> Peer:
    from galore_torch import GaLoreAdamW

    projected, others = _matrices_of_layers(model)
    group = {"params": projected, "rank": 32, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return _with(GaLoreAdamW([{"params": others}, group], lr=LEARNING_RATE), model)


def apollo_mini(model: LlamaForCausalLM) -> Peer:
    from apollo_torch import APOLLOAdamW

    projected, others = _matrices_of_layers(model)
    group = {
        "params": projected,
        "rank": 1,
        "proj": "random",
        "scale_type": "tensor",
        "scale": 128,
        "update_proj_gap": 200,
        "proj_type": "std",
    }
    return _with(APOLLOAdamW([{"params": others}, group], lr=LEARNING_RATE), model)


def adam_mini(model: LlamaForCausalLM) -> Peer:
    from adam_mini import Adam_mini

    config = model.config
    optimizer = Adam_mini(
        named_parameters=model.named_parameters(),
        lr=LEARNING_RATE,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        verbose=False,
    )
    return _with(optimizer, model)


def lomo(model: LlamaForCausalLM) -> Peer:
    """Plain SGD, which has no state, inside backward."""
    from lomo_optim import Lomo

    optimizer = Lomo(model, lr=1e-3)
    return Peer(model, backward=lambda loss: optimizer.fused_backward(loss, 1e-3))


def lora(model: LlamaForCausalLM) -> Peer:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return _with(AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE), adapted)


def rotation_by_hand(model: LlamaForCausalLM) -> Peer:
    """What this project does, without it: blocks in turn, one tensor's state on the device at a time."""
    optimizers = {p: AdamW([p], lr=LEARNING_RATE, foreach=False) for p in model.parameters()}
    blocks = [[model.get_parameter(name) for name in block.parameters] for block in partition(model).blocks]
    model.requires_grad_(False)

    def turns() -> Iterator[list[nn.Parameter]]:
        while True:
            yield from reversed(blocks)

    turn = turns()
    block: list[nn.Parameter] = []

    def begin() -> None:
        block[:] = next(turn)
        for parameter in block:
            parameter.requires_grad_(True)

    def move_moments(parameter: nn.Parameter, device: torch.device) -> None:
        state = optimizers[parameter].state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name].to(device)

    def update() -> None:
        for parameter in block:
            move_moments(parameter, parameter.device)
            optimizers[parameter].step()
            move_moments(parameter, torch.device("cpu"))
            parameter.grad = None
            parameter.requires_grad_(False)

    return Peer(model, update, begin=begin)
