"""``torch.compile`` and blocks that take turns.

A graph is compiled for what requires a gradient in it. A layer knows few such cases (frozen with an input that needs no
gradient, frozen with one that does, active), and layers of a class share their graphs, so compiling each layer takes as
many graphs for 4 layers as for 80. What is compiled as a whole needs one for each block, and torch gives up at 8.
"""

import warnings
from types import MethodType
from typing import Any

from torch import nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.partition import Plan, partition


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile each layer of a model in place, as :meth:`torch.nn.Module.compile` does; names do not change.

    Args:
        model: in a LightningModule, call it at the end of ``__init__`` or in ``configure_model``. Layers that are no
            module with others in it (mostly the embeddings and the head) are left as they are.
        options: of :func:`torch.compile`.

    Raises:
        ConfigurationError: if there is no layer to compile.
    """
    modules = dict(model.named_modules())
    found = [modules[layer.name] for layer in partition(model).layers if layer.name in modules]
    layers = [layer for layer in found if any(True for _ in layer.children())]
    if not layers:
        raise ConfigurationError(
            f"`compile_layers` finds no layer of `{type(model).__name__}` that is a module with others in it; print "
            "`hift_lightning.engine.partition.partition(model)` to see its layers, or compile what you like by hand."
        )
    _warn_of_a_cache(model)
    for layer in layers:
        if type(layer).forward.__module__.startswith("torch.nn."):
            # Torch does not begin a graph in its own files, so there it is given a function of this one to begin in.
            layer.forward = MethodType(forward, layer)
        layer.compile(**options)


def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own; it has that name because it is pickled with the model under it."""
    return type(layer).forward(layer, *args, **kwargs)


def warn_of_compiled_blocks(model: nn.Module, plan: Plan) -> None:
    """Warn of modules that are compiled with more than one block in them.

    Args:
        model: whose modules.
        plan: its blocks.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if not _is_compiled(module) or any(path.startswith(outer) for outer in found):
            continue
        inside = [block for block in plan.blocks if any(name.startswith(prefix) for name in block.own_parameters)]
        if len(inside) > 1:
            found.append(prefix)
            warnings.warn(
                f"`{path or type(model).__name__}` is compiled with {len(inside)} blocks in it, so torch compiles it "
                "anew for each of them, and after 8 times (`torch._dynamo.config.recompile_limit`) runs it without "
                "compilation; results are the same, but leave its `torch.compile` out and compile each layer: "
                "`compile_layers(model)` from `hift_lightning.engine.compilation`.",
                stacklevel=4,
            )


def _warn_of_a_cache(model: nn.Module) -> None:
    found = next((module for module in model.modules() if _keeps_a_cache(getattr(module, "config", None))), None)
    if found is not None:
        warnings.warn(
            f"`config.use_cache` of `{type(found).__name__}` is true, so each layer writes keys and values to a place "
            "of its own, and torch compiles it anew for each of them and after 8 times runs layers without "
            "compilation; set `config.use_cache = False`, as training has no use for the cache.",
            stacklevel=3,
        )


def _keeps_a_cache(config: Any) -> bool:
    # encoders such as BERT have the switch too, and no cache; T5 has one, but layers of two kinds in any case
    switched_on = getattr(config, "use_cache", None) is True and getattr(config, "is_decoder", None) is not False
    return switched_on and not getattr(config, "is_encoder_decoder", False)


def _is_compiled(module: nn.Module) -> bool:
    # a module in `torch.compile(...)`, and a LightningModule that Lightning took out of it, have a compiled `forward`
    forward = module.forward
    wrapped = hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
    return module._compiled_call_impl is not None or wrapped
