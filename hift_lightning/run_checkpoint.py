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
    done, so that it can go on. With `save_on_train_epoch_end=False` and no `monitor` the end is not saved. Under a
    `monitor`, which decides what is kept, it is saved only if nothing else ever was.

    Args:
        arguments: those of `ModelCheckpoint`.
    """

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == trainer.max_steps:
            self._save_end(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, unless the last step has been saved already."""
        self._save_end(trainer)
        wanted = self.save_top_k != 0 and not self._should_skip_saving_checkpoint(trainer)
        if self.monitor is not None and wanted and not self.best_model_path:
            rank_zero_warn(
                f"No checkpoint was saved by `monitor={self.monitor}` in the whole run, so that of its end is saved; "
                "validate more often (`trainer.val_check_interval`), or monitor what is measured more often."
            )
            # under the name alone, so that nothing that the monitor keeps has to make room
            self._save_checkpoint(trainer, self.format_checkpoint_name(self._monitor_candidates(trainer)))
        super().on_train_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save; the application tells at its end what was saved, and Lightning would tell it of what was not too."""
        if self._should_save_on_exception(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
            self._save_last_checkpoint(trainer, candidates)

    def _saves_end(self, trainer: L.Trainer) -> bool:
        wanted = self._save_on_train_epoch_end is not False and self.save_top_k != 0
        return wanted and not self._should_skip_saving_checkpoint(trainer)

    def _save_end(self, trainer: L.Trainer) -> None:
        if self.monitor is None and self._saves_end(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
