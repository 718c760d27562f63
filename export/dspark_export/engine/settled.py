"""A process that repeats itself: no address randomisation, and one core, on which a waking thread interrupts no other.

``python -m dspark_export.engine.settled MODULE`` becomes ``python -m MODULE``. It imports little: it starts twice.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_ASK, _NO_RANDOMISATION = 0xFFFFFFFF, 0x0040000
"""Flags of personality(2)."""


def randomised() -> bool:
    """Whether this process has address randomisation, or its system does not tell."""
    flags = _personality(_ASK)
    return flags < 0 or not flags & _NO_RANDOMISATION


def settle() -> None:
    """For this process, and, what addresses are concerned, for what it executes; as far as the system allows."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _personality(max(_personality(_ASK), 0) | _NO_RANDOMISATION)


def _personality(flags: int) -> int:
    """The process's flags before the call, or -1, where a container's rules forbid to set these."""
    return int(ctypes.CDLL(None).personality(ctypes.c_ulong(flags)))


if __name__ == "__main__":
    settle()
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
