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


def compensated_rounding(
    matrix: FloatArray, scales: FloatArray, gram: FloatArray, levels: tuple[int, int] = (-LEVELS, LEVELS)
) -> NDArray[np.int8]:
    """``matrix`` [K, N] in units of ``scales``, int8 [K, N] within ``levels``, such that ``x @ (values * scales)`` is
    near ``x @ matrix`` for inputs x like those whose Gram matrix ``x.T @ x`` is ``gram`` [K, K].

    ``scales`` is [N], or [G, N] with a row for each of G equal runs of input channels. Rows (input channels) are
    rounded one after the other, the liveliest first; the error of each is made up for by the rows that are still to
    come. Takes about 26 K**2 bytes beside ``gram`` and 12 K N.
    """
    size = len(matrix)
    order = np.argsort(-np.diag(gram), kind="stable")
    spread = _spread(gram, order)
    runs = scales.reshape(-1, matrix.shape[1])
    run = order // (size // len(runs))
    rest = matrix[order].astype(np.float32)
    rounded = np.empty(matrix.shape, dtype=np.int8)
    for begin in range(0, size, _BLOCK):
        end = min(begin + _BLOCK, size)
        errors = np.empty((end - begin, matrix.shape[1]), dtype=np.float32)
        for row in range(begin, end):
            step = runs[run[row]]
            digits = np.clip(np.rint(rest[row] / step), *levels)
            rounded[order[row]] = digits.astype(np.int8)
            error = (rest[row] - digits * step) / spread[row, row]
            rest[row + 1 : end] -= spread[row, row + 1 : end, None] * error
            errors[row - begin] = error
        rest[end:] -= spread[begin:end, end:].T @ errors
    return rounded


def _spread(gram: FloatArray, order: NDArray[np.intp]) -> FloatArray:
    """Upper triangular U with ``U.T @ U`` the inverse of the damped Gram matrix, rows and columns in ``order``: its row
    i says how an error in row i is best spread over the rows after it, once those before are fixed."""
    # With both axes flipped, the Cholesky factor L gives U as the flipped inverse of L: no general inverse is needed.
    flipped = gram[np.ix_(order[::-1], order[::-1])].astype(np.float64)
    flipped[np.diag_indices(len(flipped))] += _DAMPING * max(float(np.diag(flipped).mean()), 1e-30)
    lower = np.linalg.cholesky(flipped)
    del flipped
    _invert_lower(lower)
    return lower[::-1, ::-1].astype(np.float32)


def _invert_lower(lower: NDArray[np.float64]) -> None:
    """Put the inverse of a lower triangular matrix in its place, by halves."""
    size = len(lower)
    if size <= _BLOCK:
        lower[:] = np.tril(np.linalg.inv(lower))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first)
    _invert_lower(second)
    below[:] = -second @ (below @ first)
