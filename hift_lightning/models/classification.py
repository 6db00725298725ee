"""The LightningModule of the application for classification, with nothing in it that knows of HiFT."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from hift_lightning.models.optimization import OptimizedModule, OptimizerFactory, SchedulerFactory

Batch = dict[str, Tensor]


class ClassificationModule(OptimizedModule):
    """Train a classifier and measure its loss, its accuracy and its macro F1.

    Logs `train/loss` at each step and `val/loss`, `val/accuracy`, `val/f1`, and these of `test/`, at the end of an
    evaluation. F1 is the mean over classes, however many examples each has.

    Args:
        network: called with all of a batch but `labels`, it returns logits (batch x classes).
        optimizer: as for `OptimizedModule`.
        scheduler: likewise.
        num_classes: number of classes.

    Raises:
        ConfigurationError: the optimizer or the scheduler refuses its arguments.
    """

    measured = ("loss", "accuracy", "f1")

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        num_classes: int = 2,
    ) -> None:
        super().__init__(network, optimizer, scheduler)
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
            }
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    @staticmethod
    def blank_batch(rows: int, tokens: int) -> Batch:
        """Return a batch of that shape without memory, for planning."""
        ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy of the batch."""
        loss, _ = self._loss_and_logits(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to what is measured of `val/`."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to what is measured of `test/`."""
        self._evaluate(batch, "test", self.test_metrics)

    def _loss_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.network(**{name: value for name, value in batch.items() if name != "labels"})
        return cross_entropy(logits, batch["labels"]), logits

    def _evaluate(self, batch: Batch, part: str, metrics: MetricCollection) -> None:
        loss, logits = self._loss_and_logits(batch)
        metrics.update(logits, batch["labels"])
        self.log(f"{part}/loss", loss, batch_size=len(batch["labels"]), on_step=False, on_epoch=True, sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=part == "val")
