"""How much of the machine others used while something was measured."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import psutil

NOISE = 0.1
"""Cores: more than this of somebody else's work makes a measurement doubtful."""

SETTLE_SECS = 0.4
"""Between segments: cancelled requests leave their slots, and the threads of runtimes stop spinning."""


def settle(patience: float) -> None:
    """Pause between two measurements, and go on pausing while others use the machine, at most ``patience`` seconds."""
    end = time.monotonic() + patience
    while True:
        foreign = Foreign()
        time.sleep(SETTLE_SECS)
        if foreign.cores() <= NOISE or time.monotonic() >= end:
            return


class Foreign:
    """Measures the cores that processes other than this one and its descendants keep busy.

    ``cores()`` is the mean since the start; short-lived children are counted through their parents.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def cores(self) -> float:
        elapsed = time.perf_counter() - self._start
        return max(0.0, (_busy_seconds() - self._busy - (_own_seconds() - self._own)) / max(elapsed, 1e-9))


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # already in user and nice
    return float(sum(times) - idle - guest)


def _own_seconds() -> float:
    me = psutil.Process(os.getpid())
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
