"""The checkpoints of a run of the application, the last of which is of its end."""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, which also saves at the end of the run.

    With `every_n_train_steps` Lightning's own saves at multiples of it alone, and what a run has learned after the last
    of them would be lost. Not so under a `monitor`, which decides what is kept, nor with
    `save_on_train_epoch_end=False`.

    Args:
        arguments: those of `ModelCheckpoint`.
    """

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, unless the last step has been saved already."""
        wanted = self.monitor is None and self._save_on_train_epoch_end is not False
        if wanted and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        super().on_train_end(trainer, pl_module)
