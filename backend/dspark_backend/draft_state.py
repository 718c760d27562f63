"""What speculation keeps for one sequence between rounds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.rows import Rows

RECENT = 8
"""Rounds whose survival curves are kept."""

Survival: TypeAlias = NDArray[np.float64]
"""[g]: calibrated probability that drafts 1 .. k all stand."""


def extended(curve: Survival, known: Survival) -> Survival:
    """Curves [..., m] of m drafts, continued to as many as ``known`` [..., g] has, falling as that falls.

    What a block that ended early does not say is taken from earlier ones.
    """
    width = curve.shape[-1]
    if width == known.shape[-1]:
        return curve
    last = known[..., width - 1 : width]
    ratio = np.divide(known[..., width:], last, out=np.zeros_like(known[..., width:]), where=last > 0.0)
    return np.concatenate([curve, curve[..., -1:] * ratio], axis=-1)


@dataclass(eq=False)
class DraftState:
    """Context that waits, what past rounds taught, and counts."""

    pending: list[Rows] = field(default_factory=list)
    """Features [n, F] of committed positions that are not in the drafter's cache yet, in order."""
    context_length: int = 0
    """Rows in the drafter's cache."""
    expected: Survival | None = None
    """[g]: running mean of its survival curves."""
    recent: deque[Survival] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Survival curves [g] of the last rounds it drafted in, the oldest first."""
    idle_rounds: int = 0
    """Rounds since it last drafted."""

    def rounds(self, usual: Survival) -> list[Survival]:
        """``RECENT`` curves [g] that rounds to come may look like: those of the last ones, and in the place of those
        that are not known the mean, or ``usual`` before the first."""
        mean = usual if self.expected is None else self.expected
        return [mean] * (RECENT - len(self.recent)) + list(self.recent)

    @property
    def pending_rows(self) -> int:
        return sum(len(rows) for rows in self.pending)

    drafted_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0
