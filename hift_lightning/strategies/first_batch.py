"""The first training batch, before training begins."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng

from hift_lightning.engine.errors import ConfigurationError


def first_batch(trainer: Trainer) -> Any:
    """Get the first training batch, and leave everything so that training begins with it.

    Args:
        trainer: whose data are known.

    Raises:
        ConfigurationError: if there is none, or it would be lost because the data can be gone through once only.
    """
    with isolate_rng():
        loaders = trainer.fit_loop._data_source.dataloader()
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
        if any(isinstance(loader, Iterator) for loader in combined.flattened):
            raise ConfigurationError(
                "`group_size='auto'` looks at the first training batch, and the training data are an iterator that "
                "would lose it; call `strategy.choose_group_size(trainer, module, batch)` before `fit`, or give "
                "`group_size` a number."
            )
        with _same_draws(combined):
            for batch, _, _ in combined:
                return batch
    raise ConfigurationError(
        "`group_size='auto'` looks at the first training batch, and there is none; give training data."
    )


@contextlib.contextmanager
def _same_draws(combined: CombinedLoader) -> Iterator[None]:
    """Within it, loaders may draw from generators of their own, which go back to where they were."""
    generators = [
        g for loader in combined.flattened if isinstance(g := getattr(loader, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
