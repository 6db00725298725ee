"""``Module.to`` on devices for which it would make new Parameters, which an optimizer would not know."""

import contextlib
from collections.abc import Iterator

import torch


def replaces_parameters(device: torch.device) -> bool:
    """Whether ``Module.to`` makes new Parameter objects on the way to or from this device.

    It does where CPU tensors and the device's are of incompatible kinds (PrivateUse1 backends, XLA).
    """
    return not torch._has_compatible_shallow_copy_type(torch.empty(0), torch.empty(0, device=device))


@contextlib.contextmanager
def parameters_stay_themselves(device: torch.device) -> Iterator[None]:
    """Within it, ``Module.to`` changes Parameters in place on every kind of device.

    Otherwise the optimizer would be left with the old ones where they are replaced.

    Args:
        device: where the module is, or goes.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(before or replaces_parameters(device))
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
