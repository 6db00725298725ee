"""Dropout of transformers models, whose configurations have a number for each place where it is applied."""

from typing import Any

from hift_lightning.engine.errors import ConfigurationError


def set_dropout(config: Any, dropout: float | None) -> None:
    """Set each probability of dropout (https://jmlr.org/papers/v15/srivastava14a.html) in a configuration.

    LayerDrop and stochastic depth, which leave whole layers out, are other methods and are not set.

    Args:
        config: of a transformers model; changed in place.
        dropout: probability that an activation is dropped in training, from 0 to below 1; `None` for those that the
            configuration has.

    Raises:
        ConfigurationError: it is no such probability, or is more than 0 and the architecture has no dropout.
    """
    if dropout is None:
        return
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigurationError(
            f"`model.network.dropout={dropout}` is no probability of dropout; give a number from 0 to below 1, or "
            "`null` for what the model's configuration has."
        )
    config = config.get_text_config()  # of a model that reads images too, its part for text
    names = [name for name, value in vars(config).items() if _is_dropout(name, value)]
    if dropout > 0 and not names:
        raise ConfigurationError(
            f"`model.network.dropout={dropout}` cannot be set, since the architecture `{config.model_type}` has no "
            "dropout; leave it out."
        )
    for name in names:
        setattr(config, name, float(dropout))


def _is_dropout(name: str, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and ("dropout" in name or "pdrop" in name)
