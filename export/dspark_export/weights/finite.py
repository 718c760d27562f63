"""A weight source whose numbers are finite, in the checkpoint and in the dtype that they will be stored in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_export.errors import ExportError
from dspark_export.weights import WeightSource
from dspark_export.weights.wrapped import WrappedWeights

_FLOAT16_ROUNDS_TO_INFINITY = 65520.0
_PIECE = 1 << 20
"""Numbers looked at in one go: a copy of the largest tensor would not be little memory."""


class FiniteWeights(WrappedWeights):
    """Raises ExportError from ``read`` for a tensor with NaN or infinity, or a number that ``dtype`` cannot hold."""

    def __init__(self, source: WeightSource, dtype: str) -> None:
        super().__init__(source)
        self._limit = _FLOAT16_ROUNDS_TO_INFINITY if dtype == "float16" else np.inf

    def read(self, name: str) -> NDArray[Any]:
        array = super().read(name)
        flat = array.reshape(-1)
        for begin in range(0, flat.size, _PIECE):
            largest = float(np.abs(flat[begin : begin + _PIECE].astype(np.float32)).max())
            if not np.isfinite(largest):
                raise ExportError(
                    f"{name}: expected finite numbers, got NaN or infinity; the checkpoint is damaged, download "
                    "it again"
                )
            if largest >= self._limit:
                raise ExportError(
                    f"{name}: expected numbers that float16 can hold, at most 65504, got {largest:.6g}; export with "
                    "--dtype bfloat16 or float32"
                )
        return array
