"""Causal language models: a transformers decoder with its head over the vocabulary."""

from collections.abc import Mapping
from typing import Any

import torch

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.architecture import architecture, check_vocabulary, keep_constants, random_model
from hift_lightning.models.dropout import set_dropout
from hift_lightning.models.pretrained import check_transformers, pretrained_model

# models with a head over the vocabulary whose loss is that of masked or permuted tokens, or of the token itself
_OF_OTHER_KINDS = ("flaubert", "trocr", "xlm", "xlnet")


def causal_lm(
    tokenizer: Any,
    pretrained: str | None,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    lossless: bool = False,
    weights: bool = True,
    dropout: float | None = None,
) -> Any:
    """Build a causal language model on pretrained or random weights.

    Args:
        tokenizer: the tokenizer whose tokens the model will see; `None` where that is not known.
        pretrained: where the weights lie, as `hift_lightning.models.pretrained.locate` takes it; `None` for
            random weights of the shape that `config` tells, on torch's default device and in its default dtype.
        config: `model_type` and the numbers of its transformers configuration; only for random weights.
        dtype: of pretrained weights; `None` for that of their files.
        lossless: take a wider one where this one would round them.
        weights: `False` for the architecture alone, on "meta" and with the dropout of its configuration.
        dropout: as for `hift_lightning.models.dropout.set_dropout`.

    Returns:
        A transformers model in training mode: called with `input_ids` (batch x tokens), its result has `logits`
        (batch x tokens x vocabulary).

    Raises:
        ConfigurationError: the weights cannot be found, or lack tensors of the model or have others; the
            configuration cannot be used; the tokenizer has more tokens than the model; or transformers is not
            installed.
    """
    check_transformers()
    from transformers import AutoModelForCausalLM

    def configure(filled: Any) -> None:
        _look_to_the_left(filled)
        set_dropout(filled, dropout)

    if not weights:
        return architecture(AutoModelForCausalLM, pretrained, config, _look_to_the_left)
    if pretrained is None:
        model = random_model(AutoModelForCausalLM, config, configure)
    else:
        model, unexpected = pretrained_model(AutoModelForCausalLM, pretrained, dtype, lossless, configure)
        if unexpected:
            raise ConfigurationError(
                f"`model.pretrained={pretrained}` has {len(unexpected)} tensors that its config.json has no place for, "
                f"the first is `{unexpected[0]}`; give a folder whose weights fit its config.json."
            )
    check_vocabulary(tokenizer, model)
    model.config.use_cache = False
    keep_constants(model)
    return model.train()


def _look_to_the_left(config: Any) -> None:
    """Make a configuration that of a decoder, where it may be that of an encoder too.

    Raises:
        ConfigurationError: models of this architecture have no loss of the next token.
    """
    if getattr(config, "is_encoder_decoder", False) or config.model_type in _OF_OTHER_KINDS:
        raise ConfigurationError(
            f"Models of the architecture `{config.model_type}` do not learn to predict the next token; give one that "
            "does, such as `llama`."
        )
    if getattr(config, "is_decoder", None) is False:  # BERT and its like look in both directions otherwise
        config.is_decoder = True
    if getattr(config, "attention_type", None) == "block_sparse":  # of BigBird, which is for both directions
        config.attention_type = "original_full"
