"""``Trainer(strategy="hift")``: HiFT on one device."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _DEVICE
from lightning.pytorch.strategies import SingleDeviceStrategy

from hift_lightning.strategies.blockwise import BlockwiseTraining


class HiFTStrategy(BlockwiseTraining, SingleDeviceStrategy):
    """Full-parameter fine-tuning of an unchanged LightningModule, one block of layers at a time.

    Under automatic optimization there is one optimizer, of any kind but LBFGS and those that step another one;
    for several use manual optimization, where each is rotated over its own parameters.

    Args:
        device: the device, by default the one that the Trainer chooses.
        arguments: those of :class:`~hift_lightning.strategies.blockwise.BlockwiseTraining` (``group_size``, ``order``,
            ``offload``, ``update`` and so on), and of :class:`~lightning.pytorch.strategies.SingleDeviceStrategy`
            (``accelerator``, ``checkpoint_io``, ``precision_plugin``).

    Raises:
        ConfigurationError: if a value cannot work.
        MisconfigurationException: from the Trainer, if more than one device is asked for or visible.

    Source: Liu et al., "HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy",
    https://arxiv.org/abs/2401.15207
    """

    strategy_name = "hift"

    def __init__(self, *, device: _DEVICE | None = None, **arguments: Any) -> None:
        super().__init__(device="cpu" if device is None else device, **arguments)
        self._given_devices = None if device is None else [self.root_device]

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device that was given, or ``None``: then each Trainer sets the one that it has chosen.

        The registry builds a strategy before devices are known; the Trainer then sets this attribute, as on
        strategies for many devices.
        """
        return self._given_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"`strategy='hift'` trains on one device and the Trainer has {len(devices)}; pass `devices=1`, or "
                "`strategy='hift_ddp'` for data-parallel training."
            )
        self._root_device = devices[0]
