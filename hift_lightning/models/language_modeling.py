"""The LightningModule of the application for causal language models, with nothing in it that knows of HiFT."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from hift_lightning.data.packing import NOT_COUNTED
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.optimization import OptimizedModule, OptimizerFactory, SchedulerFactory

Batch = dict[str, Tensor]


class WeightedMean(MeanMetric):
    """A mean that is added up in 32 bits at least, whatever the module is converted to; NaN makes it NaN."""

    def __init__(self) -> None:
        super().__init__(nan_strategy=math.nan)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def apply(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed.float() if changed.dtype in (torch.bfloat16, torch.float16) else changed

        return super()._apply(apply, exclude_state)


class Perplexity(WeightedMean):
    """The exponential of the mean cross entropy."""

    def compute(self) -> Tensor:
        """Return it for everything that has been added."""
        return torch.exp(super().compute())


class LanguageModelingModule(OptimizedModule):
    """Train a causal language model and measure its loss and perplexity.

    Logs `train/loss` at each step and `val/loss`, `val/perplexity`, `test/loss`, `test/perplexity` at the end
    of an evaluation; these are of all counted tokens of that part, each with the same weight.

    A batch has `input_ids` (batch x tokens) and `labels` of the same shape: the ids again, and -100 where a token is
    not counted. The token at a place is predicted from those to the left of it, so the first label of a row never
    counts. There is no attention mask, since what stands to the right of a token cannot change its logits.

    Args:
        network: a causal language model of transformers, which computes the loss itself.
        optimizer: as for `OptimizedModule`.
        scheduler: likewise.

    Raises:
        ConfigurationError: the optimizer or the scheduler refuses its arguments; or, when a run begins, the data
            have more different tokens than the network.
    """

    measured = ("loss", "perplexity")

    def __init__(
        self, network: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        self.val_loss, self.test_loss = WeightedMean(), WeightedMean()
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()

    @staticmethod
    def blank_batch(rows: int, tokens: int) -> Batch:
        """Return a batch of that shape without memory, for planning."""
        ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
        return {"input_ids": ids, "labels": ids.clone()}

    def setup(self, stage: str) -> None:
        """Compare the vocabularies of data and network, where both tell theirs."""
        data = getattr(self.trainer, "datamodule", None)
        tokens = getattr(data, "vocab_size", None)
        config: Any = getattr(self.network, "config", None)
        if hasattr(config, "get_text_config"):  # a model that reads images too has one for text
            config = config.get_text_config()
        known = getattr(config, "vocab_size", None)
        if tokens is not None and known is not None and tokens > known:
            raise ConfigurationError(
                f"The data have {tokens} different tokens, the model only `vocab_size={known}`; give the model's own "
                "tokenizer with `model.tokenizer.pretrained=/path/to/folder`."
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy of the counted tokens of the batch."""
        loss, _ = self._loss_and_count(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to `val/loss` and `val/perplexity`."""
        self._evaluate(batch, "val", self.val_loss, self.val_perplexity)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to `test/loss` and `test/perplexity`."""
        self._evaluate(batch, "test", self.test_loss, self.test_perplexity)

    def _loss_and_count(self, batch: Batch) -> tuple[Tensor, Tensor]:
        count = (batch["labels"][:, 1:] != NOT_COUNTED).sum()
        # given their number, transformers divides the sum by it: rows of prompts alone have a loss of 0, not NaN
        output = self.network(
            input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=count.clamp(min=1)
        )
        return output.loss, count

    def _evaluate(self, batch: Batch, part: str, mean_loss: WeightedMean, perplexity: Perplexity) -> None:
        loss, count = self._loss_and_count(batch)
        for name, metric in (("loss", mean_loss), ("perplexity", perplexity)):
            metric.update(loss, weight=count)
            self.log(f"{part}/{name}", metric, on_step=False, on_epoch=True, prog_bar=part == "val")
