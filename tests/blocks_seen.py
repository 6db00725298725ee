"""Which block each optimizer step went to, read from the gradients that exist and not from the strategy."""

from lightning.pytorch.callbacks import Callback


class BlocksSeen(Callback):
    """Before each optimizer step, notes the layers whose parameters have a gradient.

    A layer is told by the first two parts of its parameters' names; ``steps`` is a list of frozensets.
    """

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(frozenset(layer_of(n) for n, p in pl_module.named_parameters() if p.grad is not None))


def layer_of(name):
    """``layers.0`` of ``layers.0.linear1.weight``; the final norm counts as the head."""
    parts = name.split(".")
    if parts[0] == "layers":
        return ".".join(parts[:2])
    return "head" if parts[0] == "norm" else parts[0]


BOTTOM_UP = [frozenset({layer}) for layer in ("embedding", "layers.0", "layers.1", "head")]
TOP_DOWN = BOTTOM_UP[::-1]
