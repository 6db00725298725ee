"""Root may write to every folder; this takes that away."""

import ctypes
import os
import sys

_VERSION_3 = 0x20080522
_WORDS = 2 * 3  # effective, permitted and inheritable, of two times 32 capabilities
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def obey_permissions() -> None:
    """Let this process, until its end, write only to what the permissions of files and folders allow (Linux).

    Source: ``man 2 capset``.

    Raises:
        OSError: if the system does not let it.
    """
    if sys.platform != "linux":
        if os.geteuid() == 0:
            raise OSError("root can give up its right to write everywhere on Linux only")
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, words = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * _WORDS)()
    if libc.capget(header, words) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for word in range(3):
        words[word] &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    if libc.capset(header, words) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
