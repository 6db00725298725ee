"""The simulated accelerator as Lightning sees it."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from typing_extensions import override

from tests.simulated_accelerator import device_module
from tests.simulated_accelerator.backend import compiler_missing, load


class SimulatedAccelerator(Accelerator):
    """One device `sim:0`: `L.Trainer(accelerator="sim", devices=1, strategy=SingleDeviceStrategy(device="sim:0"))`.

    Moving a module to the device makes new `Parameter` objects, as moving to any device but CUDA does: what was tied
    stays tied only where the model ties it anew, and an optimizer made before holds the old ones.
    `torch.__future__.set_swap_module_params_on_conversion(True)` keeps the objects; it is not set here, since it
    changes the whole process.
    """

    def __init__(self) -> None:
        load()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        # For a string like "bf16-mixed" Lightning takes every accelerator but the CPU for CUDA, and without one the
        # autocast and the gradient scaler would disable themselves.
        precision = trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.device == "cuda":
            precision.device = "sim"
            if precision.scaler is not None:
                precision.scaler = torch.amp.GradScaler("sim")

    @override
    def setup_device(self, device: torch.device) -> None:
        if device.type != "sim":
            raise ValueError(f"Device should be `sim`, got `{device}` instead")

    @override
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return device_module.memory_stats()

    @override
    def teardown(self) -> None:
        pass

    @staticmethod
    @override
    def parse_devices(devices: int | str | list[int]) -> int:
        if devices not in (1, "1", [0], "auto"):
            raise ValueError(f"there is one simulated device, so `devices={devices!r}` has to be 1")
        return 1

    @staticmethod
    @override
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device("sim", 0)]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return 1

    @staticmethod
    @override
    def is_available() -> bool:
        return compiler_missing() is None

    @staticmethod
    @override
    def name() -> str:
        return "sim"


if "sim" not in AcceleratorRegistry:
    AcceleratorRegistry.register("sim", SimulatedAccelerator, description="host memory counted as a device's")
