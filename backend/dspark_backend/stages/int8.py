"""Int8 matrices: symmetric, a scale an output channel. Shared by the exports and by the loader of a drafter's head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray

LEVELS = 127
"""Of either sign; -128 is not used, so that a matrix and its negative have the same rounding."""
_SMALLEST = np.float32(1e-30)


@dataclass(frozen=True)
class Int8Matrix:
    """``values * scales`` approximates the matrix."""

    values: NDArray[np.int8]
    """[K, N]"""
    scales: FloatArray
    """float32 [N]"""


def column_scales(matrix: FloatArray) -> FloatArray:
    """Scale of every column of [K, N], float32 [N]; a column of zeros gets a tiny one."""
    largest = np.maximum(matrix.max(axis=0), -matrix.min(axis=0)).astype(np.float32)
    return np.asarray(np.maximum(largest / np.float32(LEVELS), _SMALLEST), dtype=np.float32)


def round_columns(matrix: FloatArray, scales: FloatArray) -> NDArray[np.int8]:
    """``matrix`` [K, N] in units of its columns' ``scales`` [N]."""
    digits: NDArray[np.int8] = np.clip(np.rint(matrix / scales), -LEVELS, LEVELS).astype(np.int8)
    return digits


def int8_matrix(matrix: FloatArray) -> Int8Matrix:
    """The nearest Int8Matrix of float32 [K, N]."""
    scales = column_scales(matrix)
    return Int8Matrix(round_columns(matrix, scales), scales)
