"""The parity oracle: the published HiFT trainer's arithmetic as a plain loop.

It imports nothing of the package; the blocks come in as lists of parameter names, bottom first. That this loop equals
the published trainer bit for bit (fp32, AdamW, one layer a block) was found by running both.
"""

import random

import torch


def turns_of(order, blocks, seed=0):
    """The order of the blocks' turns, written down anew."""
    turns = list(range(blocks))
    if order == "top2down":
        turns.reverse()
    if order == "random":
        random.Random(seed).shuffle(turns)
    return turns


def reference_loop(
    model, optimizer, blocks, turns, batches, *, accumulate=1, clip_norm=None, clip_value=None, scheduler=None
):
    """Train on all batches; returns the losses of the micro-batches and the rates used."""
    named = dict(model.named_parameters())
    losses, rates = [], []
    for step in range(len(batches) // accumulate):
        active = set(blocks[turns[step % len(turns)]])
        for name, parameter in named.items():
            parameter.requires_grad_(name in active)
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            loss = model.loss(batch)
            losses.append(loss.item())
            (loss / accumulate).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip_norm)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_([p for p in model.parameters() if p.grad is not None], clip_value)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scheduler is not None and (step + 1) % len(turns) == 0:
            scheduler.step()
    return losses, rates
