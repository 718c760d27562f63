"""A process that repeats itself: no address randomisation, and one core, on which a thread runs until it waits.

``python -m dspark_export.engine.settled MODULE`` becomes ``python -m MODULE``. It imports little: it starts twice.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_ASK, _NO_RANDOMISATION = 0xFFFFFFFF, 0x0040000
"""Flags of personality(2)."""


def missing() -> tuple[str, ...]:
    """What the system did not allow this process."""
    flags, lacks = _personality(_ASK), []
    if flags < 0 or not flags & _NO_RANDOMISATION:
        lacks.append("without address randomisation (personality(2))")
    if os.sched_getscheduler(0) != os.SCHED_FIFO:
        lacks.append("one thread at a time (SCHED_FIFO on one of several cores)")
    return tuple(lacks)


def settle() -> None:
    """For this process and what it executes, as far as the system allows."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    # What else wants that core waits, or moves to another: so there must be one.
    policies = [(os.SCHED_FIFO, 1), (os.SCHED_BATCH, 0)][len(cores) < 2 :]
    for policy, priority in policies:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(priority))
            break
    _personality(max(_personality(_ASK), 0) | _NO_RANDOMISATION)


def _personality(flags: int) -> int:
    """The process's flags before the call, or -1, where a container's rules forbid to set these."""
    return int(ctypes.CDLL(None).personality(ctypes.c_ulong(flags)))


if __name__ == "__main__":
    settle()
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
