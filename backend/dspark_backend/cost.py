"""The cost curve SPS(B): how long a verification step of B tokens takes on the machine that serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CostTable:
    """Measured step times, between which we interpolate.

    Raises:
        ValueError: the token counts do not ascend, or the times are not positive.
    """

    token_counts: tuple[int, ...]
    """B at the measured points, ascending."""
    seconds: tuple[float, ...]
    """Step time at each point, seconds."""

    def __post_init__(self) -> None:
        if len(self.token_counts) != len(self.seconds) or not self.seconds:
            raise ValueError("expected as many times as token counts, at least one")
        if list(self.token_counts) != sorted(set(self.token_counts)):
            raise ValueError(f"token_counts: expected ascending counts, got {self.token_counts}")
        for seconds in self.seconds:
            if not 0 < seconds < float("inf"):
                raise ValueError(f"seconds: expected positive times, got {seconds}")

    def step_seconds(self, token_count: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Predicted seconds of a step, linear between measured points and beyond the last two, where never falling."""
        counts, seconds = np.asarray(self.token_counts, dtype=np.float64), np.asarray(self.seconds)
        wanted = np.asarray(token_count, dtype=np.float64)
        inside = np.interp(wanted, counts, seconds)
        if len(counts) == 1:
            return np.asarray(inside)
        # Noise can make the last point the cheaper one; extrapolating that would end below zero.
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2]))
        return np.asarray(inside + np.maximum(wanted - counts[-1], 0.0) * slope)

    def sps(self, token_count: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Steps a second at B tokens: SPS(B) of the paper's equation for throughput, tau * SPS(B)."""
        return np.asarray(1.0 / self.step_seconds(token_count))
