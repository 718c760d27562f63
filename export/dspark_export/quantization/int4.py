"""Matrices in int4 as TensorRT takes them: symmetric, a scale for each block of input channels of an output channel.

TensorRT refuses zero points other than 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray
from dspark_export.quantization.rounding import compensated_rounding

INT4_BLOCK = 64
"""Input channels that share a scale; TensorRT takes 64 and 128."""
_LOWEST, _HIGHEST = -8, 7
_SMALLEST = 1e-12
_SHARES = tuple(float(share) for share in np.linspace(1.0, 0.55, 16))
"""Scales that are tried, as shares of the one that clips nothing."""


@dataclass(frozen=True)
class Int4Matrix:
    """``values * scales``, block by block, approximates a matrix."""

    values: NDArray[np.int8]
    """[K, N], from -8 to 7"""
    scales: NDArray[Any]
    """[K / INT4_BLOCK, N] in the dtype that an engine computes in"""

    def dequantised(self) -> FloatArray:
        """float32 [K, N]"""
        steps = np.repeat(self.scales.astype(np.float32), len(self.values) // len(self.scales), axis=0)
        return np.asarray(self.values * steps, dtype=np.float32)


def fits_int4(inner: int, width: int) -> bool:
    """Whether a product [inner, width] has whole blocks and whole bytes."""
    return inner % INT4_BLOCK == 0 and width % 2 == 0


def nearest_int4(matrix: FloatArray, dtype: np.dtype[Any], block: int = INT4_BLOCK) -> Int4Matrix:
    """Of ``matrix`` [K, N], every weight by itself; the scales, of ``dtype``, clip nothing."""
    scales = _full_scales(matrix, block).astype(dtype)
    return Int4Matrix(_nearest(_blocks(matrix, block), scales.astype(np.float32)).reshape(matrix.shape), scales)


def compensated_int4(
    matrix: FloatArray, gram: FloatArray, dtype: np.dtype[Any], block: int = INT4_BLOCK
) -> Int4Matrix:  # fmt: skip
    """Of ``matrix`` [K, N], by GPTQ for inputs with the Gram matrix ``gram`` [K, K].

    The scales, of ``dtype``, are chosen before: those with the smallest error of weights that are rounded to the
    nearest, each input channel weighed by its energy. So the order in which channels are rounded is free.
    """
    scales = _searched_scales(matrix, np.diag(gram), dtype, block)
    values = compensated_rounding(matrix, scales.astype(np.float32), gram, (_LOWEST, _HIGHEST))
    return Int4Matrix(values, scales)


def _blocks(matrix: FloatArray, block: int) -> FloatArray:
    """[K / block, block, N]"""
    return matrix.reshape(-1, block, matrix.shape[1])


def _full_scales(matrix: FloatArray, block: int) -> FloatArray:
    largest = np.abs(_blocks(matrix, block)).max(axis=1)
    return np.asarray(np.maximum(largest, _SMALLEST) / _HIGHEST, dtype=np.float32)


def _nearest(blocks: FloatArray, scales: FloatArray) -> NDArray[np.int8]:
    """[G, block, N] in units of [G, N]."""
    digits: NDArray[np.int8] = np.clip(np.rint(blocks / scales[:, None]), _LOWEST, _HIGHEST).astype(np.int8)
    return digits


def _searched_scales(matrix: FloatArray, energy: FloatArray, dtype: np.dtype[Any], block: int) -> NDArray[Any]:
    full = _full_scales(matrix, block)
    found = np.empty(full.shape, dtype=dtype)
    # A block at a time: the search is repeated on what a cache holds.
    for index, (rows, weights) in enumerate(zip(_blocks(matrix, block), energy.reshape(-1, block), strict=True)):
        candidates = np.stack([full[index] * np.float32(share) for share in _SHARES]).astype(dtype)
        errors = []
        for scales in candidates.astype(np.float32):
            off = np.clip(np.rint(rows / scales), _LOWEST, _HIGHEST) * scales - rows
            errors.append(weights @ (off * off))
        best = np.argmin(errors, axis=0)
        found[index] = np.take_along_axis(candidates, best[None], axis=0)[0]
    return found
