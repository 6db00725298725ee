"""Models of a transformers architecture with random weights, from the numbers of a configuration alone."""

import copy
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.pretrained import Configure, as_it_is, pretrained_architecture, reads

# what models of transformers call the table that they look a token's position up in
POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


def random_model(model_class: Any, config: Mapping[str, Any], configure: Configure = as_it_is) -> Any:
    """Build a model with random weights, on torch's default device and in its default dtype.

    Under `torch.device("meta")` the weights take no memory; nothing is asked of a hub in any case.

    Args:
        model_class: a class such as `transformers.AutoModel`.
        config: `model_type`, the architecture's transformers name, and numbers of its configuration; those not
            given have transformers' defaults.
        configure: given the filled configuration before the model is made, to change it.

    Raises:
        ConfigurationError: there is no such architecture, it has no such number, or the numbers make no model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    numbers = dict(config)
    kind = numbers.pop("model_type", None)
    _check_names(kind, numbers)
    try:
        filled = AutoConfig.for_model(kind, **numbers)
        configure(filled)
        return model_class.from_config(filled)
    except ConfigurationError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"`model.network.config={dict(config)}` makes no model ({reason}); mend the number that it names."
        ) from error


def architecture(
    model_class: Any, pretrained: str | None, config: Mapping[str, Any], configure: Configure = as_it_is
) -> Any:
    """Build a model on "meta", for its configuration and the names and shapes of its weights.

    Args:
        model_class: a class such as `transformers.AutoModel`.
        pretrained: where its configuration lies, as `hift_lightning.models.pretrained.locate` takes it; `None` for the
            one that `config` tells.
        config: as for `random_model`.
        configure: likewise.

    Raises:
        ConfigurationError: see `random_model` and `hift_lightning.models.pretrained.pretrained_architecture`.
    """
    with torch.device("meta"):
        if pretrained is None:
            return random_model(model_class, config, configure)
        return pretrained_architecture(model_class, pretrained, configure)


def is_causal(config: Any) -> bool:
    """Whether a token sees none after it, in a body without head of this configuration.

    It is told without weights: by the attention of the body, and where that does not say, as in Bloom and Mamba, by
    whether it is a decoder or transformers has its architecture for the next token and not for masked ones.

    Args:
        config: of a transformers model; stays as it is.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoModel

    with torch.device("meta"):
        body = AutoModel.from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
    # of a model that reads images too, its part for text
    told = [module.is_causal for module in (body.get_decoder() or body).modules() if hasattr(module, "is_causal")]
    if told:
        return all(told)
    if getattr(config, "is_decoder", False):
        return True
    # XLNet learns the next one of an order that is drawn anew for each text
    learns_the_next_token = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type != "xlnet"
    return learns_the_next_token and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def keep_constants(model: nn.Module) -> None:
    """Keep the dtype of buffers that are computed and not trained when the model is cast.

    Lightning's 16-bit precisions cast all buffers. Rotary frequencies in bf16 are wrong by up to 0.4 %, which is
    radians at position 1000; transformers itself keeps them in fp32.

    Args:
        model: changed in place: its modules with floating-point buffers that no checkpoint holds.
    """
    for module in model.modules():
        if _constants(module):
            # no method: pickle would look one up by its name in the module's class
            module._apply = functools.partial(_apply_to_all_but_constants, module)  # type: ignore[method-assign]


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Raise if the tokenizer has tokens that the model has not.

    Args:
        tokenizer: `None` is not looked at.
        model: a transformers model.

    Raises:
        ConfigurationError: it has.
    """
    known = model.config.get_text_config().vocab_size
    if tokenizer is not None and len(tokenizer) > known:
        raise ConfigurationError(
            f"The tokenizer has {len(tokenizer)} tokens, the model only `vocab_size={known}`; "
            "give the model's own tokenizer with `model.tokenizer.pretrained=/path/to/folder`."
        )


def check_positions(network: nn.Module, max_length: int) -> None:
    """Raise if rows of `max_length` tokens are longer than the network's table of positions.

    Positions that are computed, as rotary ones are, have no such end: a warning tells where rows are longer than those
    that the configuration of the model names.

    Args:
        network: with a model of transformers in it.
        max_length: tokens of the longest row.

    Raises:
        ConfigurationError: they are.
    """
    known = positions_of(network)
    if known is not None and max_length > known:
        raise ConfigurationError(
            f"`data.max_length={max_length}` is more than the {known} positions of the model; give "
            f"`data.max_length={known}` or less."
        )
    configs = (getattr(module, "config", None) for module in network.modules())
    positions = [getattr(config, "max_position_embeddings", None) or 0 for config in configs]
    named = min((number for number in positions if number > 0), default=max_length)
    if max_length > named:
        rank_zero_warn(
            f"`data.max_length={max_length}` is more than the {named} positions that the model is made for, and it may "
            f"not tell those behind them apart; give `data.max_length={named}` or less."
        )


def positions_of(network: nn.Module) -> int | None:
    """Return how many positions the network has a table of, which is how long a row may be; `None` without a table."""
    return min((rows for module in network.modules() for rows in _positions_in_tables(module)), default=None)


def _positions_in_tables(module: nn.Module) -> Iterator[int]:
    for name in POSITION_TABLES:
        table = getattr(module, name, None)
        if isinstance(table, nn.Embedding):
            # RoBERTa counts positions from behind the padding's, OPT leaves `offset` rows at the beginning out
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            yield table.num_embeddings - first - getattr(table, "offset", 0)
        elif isinstance(table, Tensor):  # of sines, as GPT-J has
            yield len(table)


def _apply_to_all_but_constants(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    before = _constants(self)
    type(self)._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
    for name, buffer in _constants(self).items():
        if buffer.dtype != before[name].dtype:
            self._buffers[name] = before[name].to(buffer.device)
    return self


def _constants(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and buffer.is_floating_point()
    }


def _check_names(kind: Any, numbers: Mapping[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise ConfigurationError(
            f"`model.network.config.model_type={kind}` is no architecture of transformers; "
            f"{_suggestion(str(kind), CONFIG_MAPPING, 'give one, such as `llama`.')}"
        )
    defaults = CONFIG_MAPPING[kind]()
    for name in numbers:
        if not reads(CONFIG_MAPPING[kind], name):
            raise ConfigurationError(
                f"`model.network.config.{name}` is no number of the architecture `{kind}`; "
                f"{_suggestion(name, vars(defaults), 'leave it out.')}"
            )


def _suggestion(word: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{close[0]}`?" if close else otherwise
