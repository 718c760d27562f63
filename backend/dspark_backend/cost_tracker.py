"""Whether the cost model still tells the truth: predicted against actual times, online."""

from __future__ import annotations

import math
from dataclasses import dataclass

_CLIP = math.log(10.0)
"""A step that took ten times as long tells of a pause of the machine; how much longer does not matter."""


@dataclass
class CostTracker:
    """Running comparison of predicted and actual seconds of one kind of step.

    A single factor for all depths does not change what a scheduler chooses: it is for predictions that are shown, for
    weighing the drafter's time against the verifier's (a tracker each), and for knowing when to measure again.
    """

    memory: float = 0.98
    """Weight of the past at each update, in [0, 1)."""
    updates: int = 0
    _log_ratio: float = 0.0
    _error: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory < 1.0:
            raise ValueError(f"memory: expected a number in [0, 1), got {self.memory}")

    def update(self, predicted_seconds: float, actual_seconds: float) -> None:
        """Take one step into account. Ignored unless both times are positive: no prediction, or a clock too coarse."""
        if not (0.0 < predicted_seconds < math.inf and 0.0 < actual_seconds < math.inf):
            return
        self.updates += 1
        # The first updates weigh alike; otherwise the arbitrary start value would show for long.
        weight = max(1.0 - self.memory, 1.0 / self.updates)
        log_ratio = math.log(actual_seconds) - math.log(predicted_seconds)
        self._log_ratio += weight * (min(max(log_ratio, -_CLIP), _CLIP) - self._log_ratio)
        error = abs(predicted_seconds - actual_seconds) / actual_seconds
        self._error += weight * (error - self._error)

    @property
    def scale(self) -> float:
        """Running geometric mean of actual / predicted: what to multiply predictions by; 1 before the first update."""
        return math.exp(self._log_ratio)

    @property
    def mean_relative_error(self) -> float:
        """Running mean of abs(predicted - actual) / actual; 0 before the first update."""
        return self._error

    def is_stale(self, factor: float = 1.5, min_updates: int = 200) -> bool:
        """Whether predictions are off by more than ``factor``, either way, over enough steps to be sure.

        Then :meth:`dspark_backend.cost_cache.CostCache.invalidate` makes the next load measure again.
        """
        return self.updates >= min_updates and abs(self._log_ratio) > math.log(factor)
