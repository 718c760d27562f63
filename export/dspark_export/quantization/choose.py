"""The decisions of the int8 precision, from statistics of a float32 run: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.int8 import LEVELS, column_scales, round_columns
from dspark_export.quantization.activations import InputStatistics
from dspark_export.quantization.plan import DIGIT, LinearPlan

_STRENGTHS = (0.0, 0.5, 0.65, 0.8)
"""How much of the difficulty smoothing moves from activations to weights; 0 leaves everything as it is."""
_TOLERATED_ERROR = 4e-4
"""Mean squared error of a product, relative to its output, above which activations take two digits. On SmolLM2 this is
nearly every down projection (a few channels of a row are far larger than the rest) and the LM head."""
_COLUMNS = 4096
"""Output channels that are looked at: a vocabulary has more than a decision needs."""


def rounded_rows(rows: FloatArray, two_digits: bool = False) -> FloatArray:
    """``rows`` [S, K] after the rounding that the graph does: each row by its own scale, to one int8 digit or two."""
    unit = np.abs(rows).max(axis=1, keepdims=True) / np.float32(LEVELS)
    unit[unit == 0] = 1.0
    coarse: FloatArray = np.rint(rows / unit) * unit
    if not two_digits:
        return coarse
    finer = unit / DIGIT
    return np.asarray(coarse + np.rint((rows - coarse) / finer) * finer, dtype=np.float32)


def smoothing(largest: FloatArray, matrix: FloatArray, strength: float, shared: int = 0, group: int = 1) -> FloatArray:
    """SmoothQuant's factors, float32 [K]: input channel k is divided by largest[k]**a / max|W[k]|**(1 - a).

    ``shared``: channels of a head where the heads of a ``group`` must have the same factors (values are made once for
    all of them); 0 where every channel has its own.
    """
    weight = np.abs(matrix).max(axis=1)
    active = np.maximum(largest, 1e-5).astype(np.float64)
    factors = active**strength / np.maximum(weight, 1e-5) ** (1.0 - strength)
    if shared:
        heads = factors.reshape(-1, group, shared)
        factors = np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)
    return np.asarray(factors / np.exp(np.log(factors).mean()), dtype=np.float32)


def choose(statistics: InputStatistics, matrix: FloatArray, shared: int = 0, group: int = 1) -> LinearPlan:
    """The plan for ``matrix`` [K, N] with the smallest error on the sampled rows."""
    part = matrix if matrix.shape[1] <= _COLUMNS else matrix[:, :: -(-matrix.shape[1] // _COLUMNS)]
    exact = statistics.sample @ part
    candidates: list[FloatArray | None] = [
        smoothing(statistics.largest, part, strength, shared, group) if strength else None for strength in _STRENGTHS
    ]
    errors = [_relative_error(statistics.sample, part, factors, exact) for factors in candidates]
    best = int(np.argmin(errors))
    factors, gram = candidates[best], statistics.gram
    if gram is not None and factors is not None:
        gram = np.asarray(gram / np.outer(factors, factors), dtype=np.float32)
    return LinearPlan(factors, errors[best] > _TOLERATED_ERROR, gram)


def _relative_error(rows: FloatArray, matrix: FloatArray, factors: FloatArray | None, exact: FloatArray) -> float:
    """Mean over rows of the squared error of the smoothed and rounded product, relative to that of ``exact``."""
    if factors is not None:
        rows, matrix = rows / factors, matrix * factors[:, None]
    scales = column_scales(matrix)
    error = rounded_rows(rows) @ (round_columns(matrix, scales) * scales) - exact
    relative = np.square(error).sum(axis=1) / np.maximum(np.square(exact).sum(axis=1), 1e-30)
    return float(relative.mean())


def choose_all(
    statistics: Mapping[str, InputStatistics],
    weight: Callable[[str], FloatArray],
    head_layout: Callable[[str], tuple[int, int]],
    progress: Callable[[float], None],
) -> dict[str, LinearPlan]:
    """Plans by fused name. ``weight`` gives a product's matrix [K, N]; ``head_layout`` gives (head_dim, group) of
    the heads that a product's inputs are, (0, 1) where they are no heads."""
    plans = {}
    for number, (name, found) in enumerate(statistics.items()):
        shared, group = head_layout(name)
        plans[name] = choose(found, weight(name), shared, group)
        progress((number + 1) / len(statistics))
    return plans
