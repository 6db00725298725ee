"""Builds the C++ part once per machine, and registers it as torch's device type `sim` once per process."""

import atexit
import fcntl
import functools
import os
import re
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension


def compiler_missing() -> str | None:
    """Says why the simulated accelerator cannot be built on this machine; `None` where it can."""
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"the simulated accelerator needs a C++ compiler, and `{compiler}` is not on the PATH"
    if not cpp_extension.is_ninja_available():
        return "the simulated accelerator needs `ninja` to be built: pip install ninja"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "the simulated accelerator needs Python's C headers (`Python.h`) to be built"
    return None


@functools.cache
def native() -> ModuleType:
    """Returns the C++ module, having built it and registered the device `sim` where that has not happened yet.

    Raises:
        RuntimeError: There is no C++ compiler, `ninja` or `Python.h`; or the build failed.

    """
    if reason := compiler_missing():
        raise RuntimeError(reason)
    # The autograd engine counts the devices at its first backward of the process. Have that behind us, whether or
    # not the process has run one, so that the new device always adds the thread of its own.
    torch.zeros((), requires_grad=True).backward()
    name = "simulated_accelerator_torch_" + re.sub(r"\W", "_", torch.__version__)
    folder = Path(cpp_extension.get_default_build_root(), name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "builder").open("w") as file:
        # torch waits for ever for a lock file that a killed process has left; the kernel gives this one back
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        # a copy, so that checkouts of the same source in several folders share what is built
        content, source = Path(__file__).with_name("device.cpp").read_bytes(), folder / "device.cpp"
        if not source.exists() or source.read_bytes() != content:
            source.write_bytes(content)
        module = cpp_extension.load(
            name=name,
            sources=[str(source)],
            extra_cflags=["-O2"],
            build_directory=str(folder),
        )
    module.start_autograd_thread()
    atexit.register(_stop_autograd_thread, module, os.getpid())

    from tests.simulated_accelerator import device_module

    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", device_module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return module


def _stop_autograd_thread(module: ModuleType, process: int) -> None:
    if os.getpid() == process:  # a forked child has no such thread
        module.stop_autograd_thread()


def load() -> None:
    """Builds the simulated accelerator if needed (half a minute, once per machine) and registers it as `sim`.

    It stays registered until the process ends, and is `torch.accelerator` for the whole process from then on:
    `DataLoader(pin_memory=True)` pins, and code that asks `torch.accelerator.is_available()` hears yes. CPU tensors
    are computed and allocated as before, and forked DataLoader workers work.

    Raises:
        RuntimeError: There is no C++ compiler, `ninja` or `Python.h`; or the build failed.

    """
    native()
