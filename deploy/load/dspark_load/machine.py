"""What the machine is, and how much of it others used while something was measured. Linux's /proc."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def describe() -> str:
    """Processor and cores, for the report."""
    model = platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores"


class Foreign:
    """Measures the cores that processes other than this one and its descendants keep busy, as a mean since the start.

    Short-lived children count through their parents.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_ticks(), _own_ticks()

    def cores(self) -> float:
        elapsed = time.perf_counter() - self._start
        foreign = _busy_ticks() - self._busy - (_own_ticks() - self._own)
        return max(0.0, foreign / _TICKS / max(elapsed, 1e-9))


def _busy_ticks() -> int:
    # user nice system idle iowait irq softirq steal; guest times are in user and nice already
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4]


def _own_ticks() -> int:
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            ticks[pid] = sum(int(field) for field in fields[11:15])
    own = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in own and pid not in own}:
        own |= grown
    return sum(ticks.get(pid, 0) for pid in own)
