"""The checkpoints of a run of the application, the last of which is of its end."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, which also saves at the end of the run.

    With `every_n_train_steps` Lightning's own saves at multiples of it alone, and what a run has learned after the last
    of them would be lost. A run that `max_steps` ends within an epoch is saved before Lightning counts that epoch as
    done, so that it can go on. Under a `monitor`, which decides what is kept, the end is saved only if nothing else
    was, since what it watches has not been measured; with `save_on_train_epoch_end=False` never.

    Args:
        arguments: those of `ModelCheckpoint`.
    """

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if self.monitor is None and trainer.global_step == trainer.max_steps:
            self._save_end(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, unless the last step has been saved already."""
        if self.monitor is None:
            self._save_end(trainer)
        elif self._last_global_step_saved == 0 and self.save_top_k != 0 and trainer.global_step:
            rank_zero_warn(
                f"`monitor={self.monitor}` was never measured, so no checkpoint was saved by it; that of the end of "
                "the run is saved. Validate more often (`trainer.val_check_interval`), or monitor something else."
            )
            self._save_end(trainer)
        super().on_train_end(trainer, pl_module)

    def _save_end(self, trainer: L.Trainer) -> None:
        if self._save_on_train_epoch_end is not False and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.save_top_k != 0:
                self._save_none_monitor_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
