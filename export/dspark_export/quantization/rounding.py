"""Rounding of a weight matrix that makes up for its own errors (GPTQ: Frantar et al. 2023, algorithm 1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.int8 import LEVELS

_DAMPING = 0.01
"""Of the Gram matrix's mean diagonal, added to it: calibration text does not span every direction."""
_BLOCK = 64
"""Rows rounded between two updates of all rows behind them."""


def compensated_rounding(matrix: FloatArray, scales: FloatArray, gram: FloatArray) -> NDArray[np.int8]:
    """``matrix`` [K, N] in units of ``scales`` [N], int8 [K, N], such that ``x @ (values * scales)`` is near
    ``x @ matrix`` for inputs x like those whose Gram matrix ``x.T @ x`` is ``gram`` [K, K].

    Rows (input channels) are rounded one after the other, the liveliest first; the error of each is made up for by the
    rows that are still to come.
    """
    size = len(matrix)
    order = np.argsort(-np.diag(gram), kind="stable")
    damped = gram[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices(size)] += _DAMPING * max(float(np.diag(damped).mean()), 1e-30)
    spread = _inverse_factor(damped).astype(np.float32)
    rest = matrix[order].astype(np.float32)
    rounded = np.empty(matrix.shape, dtype=np.int8)
    for begin in range(0, size, _BLOCK):
        end = min(begin + _BLOCK, size)
        errors = np.empty((end - begin, matrix.shape[1]), dtype=np.float32)
        for row in range(begin, end):
            digits = np.clip(np.rint(rest[row] / scales), -LEVELS, LEVELS)
            rounded[order[row]] = digits.astype(np.int8)
            error = (rest[row] - digits * scales) / spread[row, row]
            rest[row + 1 : end] -= spread[row, row + 1 : end, None] * error
            errors[row - begin] = error
        rest[end:] -= spread[begin:end, end:].T @ errors
    return rounded


def _inverse_factor(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper triangular U with ``U.T @ U`` the inverse of a positive definite matrix: its row i says how an error in row
    i is best spread over the rows after it, once those before are fixed."""
    # With both axes flipped, the Cholesky factor L gives U as the flipped inverse of L: no general inverse is needed.
    return _lower_inverse(np.linalg.cholesky(matrix[::-1, ::-1]))[::-1, ::-1]


def _lower_inverse(lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of a lower triangular matrix, by halves."""
    size = len(lower)
    if size <= _BLOCK:
        return np.asarray(np.tril(np.linalg.inv(lower)))
    half = size // 2
    inverse = np.zeros_like(lower)
    first, second = _lower_inverse(lower[:half, :half]), _lower_inverse(lower[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = -second @ (lower[half:, :half] @ first)
    return inverse
