"""A transformer body with a pooling and a head: one class for encoders and decoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.architecture import (
    architecture,
    check_vocabulary,
    is_causal,
    keep_constants,
    positions_of,
    random_model,
)
from hift_lightning.models.dropout import set_dropout
from hift_lightning.models.pretrained import check_transformers, load_tokenizer, pretrained_model

Pooling = Literal["mean", "first", "last"]
Head = Literal["linear", "mlp"]
POOLINGS = ("mean", "first", "last")
HEADS = ("linear", "mlp")
HEAD_FILE = "head.safetensors"
"""Where `hift-export` writes the head, beside the body."""


class SentenceClassifier(nn.Module):
    """Classify sentences from the last hidden states of a transformer.

    Args:
        body: a transformers model without head; called with `input_ids` and `attention_mask`, it returns
            `last_hidden_state` (batch x tokens x width).
        width: width of the hidden states.
        num_classes: number of classes.
        pooling: `mean` over the tokens that are not padding, the `first` of them (encoders), or the `last` (decoders).
        head: `linear`; or `mlp`, a layer of that width and tanh before it, as RoBERTa has
            (https://arxiv.org/abs/1907.11692).
        dtype: of the head's weights; torch's default by default.
    """

    def __init__(
        self,
        body: nn.Module,
        width: int,
        num_classes: int,
        pooling: Pooling,
        head: Head = "linear",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        out = nn.Linear(width, num_classes, dtype=dtype)
        self.head = out if head == "linear" else nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh(), out)
        self.kind_of_head = head
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, batch x classes."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "mean":
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        elif self.pooling == "first":
            pooled = hidden[:, 0]
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
    head: Head = "linear",
    dtype: torch.dtype | None = None,
    lossless: bool = False,
    weights: bool = True,
    dropout: float | None = None,
) -> SentenceClassifier:
    """Build a `SentenceClassifier` on pretrained or random weights, with a new head or that of an export of one.

    Args:
        tokenizer: the tokenizer whose tokens the model will see; `None` where it will see none.
        pretrained: where the weights lie, as `hift_lightning.models.pretrained.locate` takes it; `None` for
            random weights of the shape that `config` tells, on torch's default device and in its default dtype.
        num_classes: number of classes.
        pooling: `mean`, `first` or `last`; `first` only where it sees the tokens after it.
        config: `model_type` and the numbers of its transformers configuration; only for random weights.
        head: `linear` or `mlp`.
        dtype: of pretrained weights; `None` for that of their files.
        lossless: take a wider one where this one would round them.
        weights: `False` for the architecture alone, on "meta" and with its configuration as it is.
        dropout: as for `hift_lightning.models.dropout.set_dropout`.

    Raises:
        ConfigurationError: the weights cannot be found or are incomplete, the configuration cannot be used,
            the first token of the model sees no other and is to be pooled, the tokenizer has more tokens than the
            model, or transformers is not installed.
    """
    check_transformers()
    from transformers import AutoModel

    def configure(filled: Any) -> None:
        set_dropout(filled, dropout)
        if pooling == "first" and is_causal(filled):
            raise ConfigurationError(
                f"`model.network.pooling=first` reads the first token, which sees none of the others in a model of the "
                f"architecture `{filled.model_type}`; give `model.network.pooling=last`."
            )

    for name, value, known in (("pooling", pooling, POOLINGS), ("head", head, HEADS)):
        if value not in known:
            raise ConfigurationError(f"`model.network.{name}={value}` is unknown; give one of {', '.join(known)}.")
    if not weights:
        body = architecture(AutoModel, pretrained, config)
        with torch.device("meta"):
            return SentenceClassifier(without_pooler(body), _width(body), num_classes, pooling, head)
    if pretrained is None:
        body = random_model(AutoModel, config, configure)
    else:
        # what else is in the files belongs to the head that they were trained with
        body, _ = pretrained_model(AutoModel, pretrained, dtype, lossless, configure)
    check_vocabulary(tokenizer, body)
    without_pooler(body)
    body.config.use_cache = False
    keep_constants(body)
    network = SentenceClassifier(body, _width(body), num_classes, pooling, head, body.dtype)
    if pretrained is not None:
        _take_head(network, pretrained)
    # transformers hands out pretrained models in evaluation mode, without dropout
    return network.train()


def load_classifier(folder: str | Path) -> tuple[SentenceClassifier, Any]:
    """Load a sentence classifier that `hift-export` has written, to predict classes with it.

    Called with `input_ids` and `attention_mask` of the tokenizer, padded, the network returns the logits, batch x
    classes. Where the labels of the run were words, `network.body.config.id2label` has that of each class.

    Args:
        folder: what `hift-export` or `hift_lightning.export.export` has written, with the tokenizer.

    Returns:
        The network, on the CPU, in the dtype of the files and in evaluation mode, and its tokenizer, which pads behind
        a sentence, as in training, and with `truncation=True` cuts it where the positions of the network end.

    Raises:
        ConfigurationError: the folder has no head, or one that is broken, does not fit the body or tells no pooling;
            or see `sentence_classifier` and `load_tokenizer`.
    """
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        raise ConfigurationError(f"`{path}` does not exist; give the folder that `hift-export` wrote of a classifier.")
    saved, told = _read_head(path)
    pooling, head = told.get("pooling"), told.get("head")
    out = saved.get("2.weight" if head == "mlp" else "weight")
    if pooling not in POOLINGS or head not in HEADS or out is None:
        raise ConfigurationError(
            f"`{path}` tells pooling={pooling} and head={head}, and has the weights {', '.join(sorted(saved))}, of "
            "which no classifier can be made; export the run anew."
        )
    tokenizer = load_tokenizer(str(folder))
    tokenizer.padding_side = "right"
    network = sentence_classifier(tokenizer, str(folder), len(out), pooling, {}, head)  # type: ignore[arg-type]
    if _shapes(network.head.state_dict()) != _shapes(saved):
        raise ConfigurationError(f"The head in `{path}` does not fit the body beside it; export the run anew.")
    if (positions := positions_of(network)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return network.eval(), tokenizer


def _take_head(network: SentenceClassifier, pretrained: str) -> None:
    """Take the head that `hift-export` has written beside the body, if it fits."""
    path = Path(pretrained) / HEAD_FILE
    if not path.is_file():
        return
    saved, told = _read_head(path)
    pooling = told.get("pooling")
    shapes, own = _shapes(saved), _shapes(network.head.state_dict())
    if (shapes, pooling) == (own, network.pooling):
        network.head.load_state_dict(saved)
        rank_zero_info(f"The head is that of `{path}`.")
        return
    rank_zero_warn(
        f"A new head is trained: that in `{path}` has weights of the shapes {shapes} and pooling={pooling}, and this "
        f"run's has {own} and pooling={network.pooling}."
    )


def _read_head(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The head's weights, and what is told of it beside them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return weights, file.metadata() or {}
    except SafetensorError as error:
        raise ConfigurationError(f"`{path}` is broken ({error}); export the model anew, or remove the file.") from error


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _width(body: Any) -> int:
    """Width of the hidden states that a body returns."""
    config = body.config.get_text_config()  # of a model that reads images too, its part for text
    return int(getattr(config, "word_embed_proj_dim", config.hidden_size))  # OPT projects them to that of its embedding


def without_pooler(body: Any) -> Any:
    """Take BERT's own pooling of the first token out of a model, which is not used and so would never be trained."""
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return body
