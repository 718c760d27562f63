"""How far a server's predictions are off while it serves."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark_backend.calibration import FloatArray, IntArray


@dataclass
class OnlineCalibration:
    """How far predictions are off at present: running means of predicted and observed acceptance of each position.

    Older drafts are forgotten exponentially. Costs a few microseconds an update.
    """

    block_size: int
    half_life: float = 500.0
    """Verified drafts of a position after which an older one counts half."""
    _sums: NDArray[np.float64] = field(init=False, repr=False)
    """[3, g]: weights, predicted survival, observed acceptance."""

    def __post_init__(self) -> None:
        self._sums = np.zeros((3, self.block_size))

    def update(self, survival: FloatArray, verified: IntArray, accepted: IntArray) -> None:
        """Add a step's rounds: predicted ``survival`` [R, g]; drafts ``verified`` and ``accepted`` [R]."""
        index = np.arange(self.block_size)
        seen = index < np.asarray(verified)[:, None]
        stood = index < np.asarray(accepted)[:, None]
        counts = seen.sum(axis=0)
        self._sums *= 0.5 ** (counts / self.half_life)
        self._sums += (counts, (survival * seen).sum(axis=0), (stood & seen).sum(axis=0))

    @property
    def errors(self) -> NDArray[np.float64]:
        """|mean predicted - mean observed| of each position, float64 [g]; nan where nothing was verified."""
        weights, predicted, observed = self._sums
        gaps = np.full(self.block_size, np.nan)
        return np.divide(np.abs(predicted - observed), weights, out=gaps, where=weights > 0.0)

    @property
    def error(self) -> float:
        """Mean of ``errors``, each position weighing as much as it was verified; 0 before anything was."""
        weights, predicted, observed = self._sums
        total = float(weights.sum())
        return float(np.abs(predicted - observed).sum() / total) if total else 0.0
