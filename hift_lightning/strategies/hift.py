"""``Trainer(strategy="hift")``: HiFT on one device."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _DEVICE
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.strategies.blockwise import BlockwiseTraining
from hift_lightning.strategies.interrupts import PatientInterrupt


class HiFTStrategy(BlockwiseTraining, SingleDeviceStrategy):
    """Full-parameter fine-tuning of an unchanged LightningModule, one block of layers at a time.

    Under automatic optimization there is one optimizer, of any kind but LBFGS; for several use manual
    optimization, where each is rotated over its own parameters.

    Args:
        group_size: layers per block; ``"auto"`` takes at the start of ``fit`` the largest one that fits
            ``memory_budget``, and where one layer a block does not, ``update="streamed"``, activation checkpointing
            and ``update="fused"`` in addition. It is planned with the data module's ``largest_batch()``, or, where
            there is no such method, with the first training batch.
        memory_budget: bytes of the device's memory that ``"auto"`` may take, such as ``"24GiB"``; by default all that
            the device has.
        order: order of the blocks' turns: ``"bottom2up"``, ``"top2down"`` or ``"random"``.
        lr_update: when a scheduler with ``interval="step"`` changes the rate. ``"cycle"``: when every block has had
            its turn, by as many scheduler steps as there were optimizer steps; ``"cycle_once"``: then, by one step,
            as the published code does; ``"step"``: at every optimizer step. Schedulers with ``interval="epoch"`` and
            ReduceLROnPlateau are left as they are.
        steps_per_block: optimizer steps before the next block has its turn.
        offload: where optimizer state is parked: ``"cpu"``, the path of a folder (files), or ``"none"`` (it stays on
            the device).
        update: ``"block"`` pages all state of the block in and makes one optimizer step; ``"streamed"`` takes it piece
            by piece through a window; ``"fused"`` does so inside backward and frees each gradient at once (no norm
            clipping, no accumulation, no GradScaler; hooks that look at gradients after backward see none).
        window: bytes of parked state and masters that ``"streamed"`` and ``"fused"`` may have on the device.
        activation_checkpointing: compute activations anew in backward, layer by layer, never below the active block.
        master_weights: fp32 masters of 16-bit weights, paged with the block (the paper's Mixed^Hi); they are taken
            before ``precision="bf16-true"`` or ``"16-true"`` rounds the weights.
        parked_dtype: keep parked moments in this dtype, such as ``"bfloat16"``.
        nonfinite: what is done about NaN or inf in the loss or in a gradient. ``"raise"`` ends the run with weights and
            optimizer state as they were before the step (with ``update="fused"`` the block has been updated by then);
            ``"skip"`` leaves the step out: the block keeps its turn, and neither the rotation nor a delayed learning
            rate counts it. Overflows under a GradScaler stay the scaler's business.
        resume_plan: what happens when a checkpoint was made with another plan of blocks. ``"same"``: an error that
            shows both; ``"rebuild"``: weights, masters and optimizer state carry over, and the rotation begins at the
            start of a cycle of this plan. Scheduler steps that were held in the checkpoint's unfinished cycle are
            passed on at the end of the new cycle, together with its own.
        layers: shell-style patterns on parameter names that override the layers found: each makes one layer.
        frozen: shell-style patterns on parameter names that are never trained.
        seed: seed of the ``"random"`` order.
        device: the device, by default the one that the Trainer chooses.
        accelerator: as for :class:`~lightning.pytorch.strategies.SingleDeviceStrategy`.
        checkpoint_io: likewise; by default a :class:`~hift_lightning.checkpoint_io.StreamingCheckpointIO`.
        precision_plugin: likewise.

    Raises:
        ConfigurationError: if a value cannot work.
        MisconfigurationException: from the Trainer, if more than one device is asked for or visible.

    Source: Liu et al., "HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy",
    https://arxiv.org/abs/2401.15207
    """

    strategy_name = "hift"

    def __init__(
        self,
        *,
        group_size: int | str = 1,
        memory_budget: str | int | None = None,
        order: str = "top2down",
        lr_update: str = "cycle",
        steps_per_block: int = 1,
        offload: str | Path = "cpu",
        update: str = "block",
        window: str | int = "256MiB",
        activation_checkpointing: bool = False,
        master_weights: bool = False,
        parked_dtype: str | None = None,
        nonfinite: str = "raise",
        resume_plan: str = "same",
        layers: Sequence[str] | None = None,
        frozen: Sequence[str] | None = None,
        seed: int = 0,
        device: _DEVICE | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            device="cpu" if device is None else device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self._parallel_devices = None if device is None else [self.root_device]
        self.settings = HiFTSettings(
            group_size=group_size,
            memory_budget=memory_budget,
            order=order,
            lr_update=lr_update,
            steps_per_block=steps_per_block,
            offload=offload,
            update=update,
            window=window,
            activation_checkpointing=activation_checkpointing,
            master_weights=master_weights,
            parked_dtype=parked_dtype,
            nonfinite=nonfinite,
            resume_plan=resume_plan,
            layers=layers,
            frozen=frozen,
            seed=seed,
        )
        self.engines = []
        self._interrupt = PatientInterrupt()

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device, or ``None`` until the Trainer has chosen it.

        The registry builds a strategy before devices are known; the Trainer then sets this attribute, as on
        strategies for many devices.
        """
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"`strategy='hift'` trains on one device and the Trainer has {len(devices)}; pass `devices=1`, or "
                "`strategy='hift_ddp'` for data-parallel training."
            )
        self._parallel_devices = devices
        self._root_device = devices[0]
