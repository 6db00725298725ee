"""A transformer body with a pooling and a linear head: one class for encoders and decoders."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.pretrained import WEIGHT_FILES, locate

Pooling = Literal["mean", "last"]


class SentenceClassifier(nn.Module):
    """Classify sentences from the last hidden states of a transformer.

    Args:
        body: a transformers model without head; called with `input_ids` and `attention_mask`, it returns
            `last_hidden_state` (batch x tokens x width).
        width: width of the hidden states.
        num_classes: number of classes.
        pooling: `mean` over the tokens that are not padding (encoders), or the `last` of them (decoders).
    """

    def __init__(self, body: nn.Module, width: int, num_classes: int, pooling: Pooling) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, num_classes)
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, batch x classes."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "mean":
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        else:
            last = attention_mask.sum(dim=1) - 1
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        logits: Tensor = self.head(pooled)
        return logits


def sentence_classifier(
    tokenizer: Any,
    pretrained: str | None,
    num_classes: int,
    pooling: Pooling,
    config: Mapping[str, Any],
) -> SentenceClassifier:
    """Build a `SentenceClassifier` on pretrained or random weights, in fp32.

    Args:
        tokenizer: the tokenizer whose tokens the model will see.
        pretrained: where the weights lie, as `hift_lightning.models.pretrained.locate` takes it; `None` for
            random weights of the shape that `config` tells.
        num_classes: number of classes.
        pooling: `mean` or `last`.
        config: `model_type` and the numbers of its transformers configuration; only for random weights.

    Raises:
        ConfigurationError: the weights cannot be found or are incomplete, the configuration cannot be used, or
            the tokenizer has more tokens than the model.
    """
    if pooling not in ("mean", "last"):
        raise ConfigurationError(f"`model.network.pooling={pooling}` is unknown; give `mean` or `last`.")
    body = _random_body(config) if pretrained is None else _pretrained_body(pretrained)
    if len(tokenizer) > body.config.vocab_size:
        raise ConfigurationError(
            f"The tokenizer has {len(tokenizer)} tokens, the model only `vocab_size={body.config.vocab_size}`; "
            "give the model's own tokenizer with `model.tokenizer.pretrained=/path/to/folder`."
        )
    if getattr(body, "pooler", None) is not None:
        # BERT's own pooling of the first token, which this classifier does not use: it would never be trained
        body.pooler = None
    body.config.use_cache = False
    # transformers hands out pretrained models in evaluation mode, without dropout
    return SentenceClassifier(body, body.config.hidden_size, num_classes, pooling).train()


def _random_body(config: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModel

    numbers = dict(config)
    try:
        return AutoModel.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(numbers.pop("model_type"), **numbers)
        )
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"`model.network.config={dict(config)}` makes no model ({reason}); mend the number that it names."
        ) from error


def _pretrained_body(pretrained: str) -> Any:
    from transformers import AutoModel

    folder = locate(pretrained, WEIGHT_FILES)
    try:
        body, found = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` cannot be loaded ({reason}); give "
            "`model.pretrained=/path/to/folder` with weights, or `model.pretrained=null` for random weights."
        ) from error
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` lacks {len(missing)} tensors of the model, the first is "
            f"`{missing[0]}`; give a folder whose weights fit its config.json."
        )
    return body
