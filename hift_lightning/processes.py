"""The application in several processes at once: one output folder, and no sweep within a sweep."""

from collections.abc import Mapping

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from hift_lightning.engine.errors import ConfigurationError

_RANK = ("RANK", "SLURM_PROCID")
"""Set for each process by `torchrun`, and by SLURM's `srun`."""


def no_folder_of_its_own(environment: Mapping[str, str]) -> list[str]:
    """Overrides with which Hydra makes no output folder, for all processes of a job but the first.

    Those of Lightning's own launcher come with the folder of the first process.

    Args:
        environment: the variables of this process.
    """
    rank = next((environment[name] for name in _RANK if name in environment), "0")
    return [] if rank == "0" else ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]


def refuse_sweep_over_processes(trainer: L.Trainer) -> None:
    """Refuse a sweep whose jobs would start processes.

    Args:
        trainer: of a job.

    Raises:
        ConfigurationError: each process that it starts would begin the whole sweep anew.
    """
    sweeps = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeps and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise ConfigurationError(
            f"A sweep (`-m`) with `trainer.devices={trainer.num_devices}` cannot be: Lightning starts the other "
            "processes by this same command, so each would begin the sweep anew; use `trainer.devices=1`, or give each "
            "job a command of its own, without `-m`, for which `torchrun` can start the processes too."
        )
