"""Rows of logits ranked as a device ranks them: equal ones in any order, the sum in float32."""

from __future__ import annotations

import numpy as np

from dspark_backend.stages.batch import RankedRows


def ranked_rows(logits: np.ndarray, temperature: float, count: int, seed: int = 0, error: float = 0.0) -> RankedRows:
    """The ``count`` largest of logits [n, V]; ``error``: relative, of the sums."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.broadcast_to(np.arange(logits.shape[1]), logits.shape), axis=1)
    values = np.take_along_axis(logits, shuffled, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    with np.errstate(over="ignore"):
        scores = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    return RankedRows(
        np.take_along_axis(shuffled, order, axis=1),
        np.take_along_axis(values, order, axis=1),
        (np.exp(scores).sum(axis=1) * (1.0 + error)).astype(np.float32),
        logits.shape[1],
    )
