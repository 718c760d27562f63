"""What is measured: a policy under a load; and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WAVES = 2
"""Requests of each stream that a closed loop sends beyond its first one, of which little is measured."""
LEAST = 8
"""Requests beyond the first ones, at least."""


@dataclass(frozen=True, order=True)
class Load:
    """``closed``: so many requests in flight, a new one for each that ends. ``open``: requests a second, at random."""

    mode: Literal["closed", "open"]
    value: float

    def requests(self, open_secs: float) -> int:
        """How many one segment sends: an open loop so many seconds long, a closed one until all streams were busy."""
        if self.mode == "closed":
            streams = int(self.value)
            return streams + max(WAVES * streams, LEAST)
        return max(6, math.ceil(self.value), round(self.value * open_secs))  # the tool refuses fewer than the rate

    @property
    def arguments(self) -> list[str]:
        """perf_analyzer's."""
        if self.mode == "closed":
            return ["--concurrency-range", f"{self.value:g}"]
        return ["--request-rate-range", f"{self.value:g}", "--request-distribution", "poisson"]

    def __str__(self) -> str:
        return f"{self.value:g} streams" if self.mode == "closed" else f"{self.value:g} requests/s"


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    policy: str
    load: Load


def default_policies(gamma: int) -> tuple[str, ...]:
    """No speculation, one draft as MTP-1, whole blocks of ``gamma``, the static rule, and the two schedulers."""
    return ("off", "fixed:1", f"fixed:{gamma}", "threshold:0.5", "causal", "lagged")


def order(policies: Sequence[str], part: int) -> list[str]:
    """The policies of one load, rotated by the part and backwards in every other one, so that drift hits all alike."""
    shift = part * 3 % len(policies)
    rotated = [*policies[shift:], *policies[:shift]]
    return rotated[::-1] if part % 2 else rotated
