"""Estimates with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
Floats = NDArray[np.float64]
Reducer = Callable[[Floats], Floats]
"""[resamples, n] -> [resamples]."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def text(self, places: int) -> str:
        return f"{self.value:.{places}f} [{self.low:.{places}f}, {self.high:.{places}f}]"


def mean(values: Floats) -> Floats:
    """Over the last axis."""
    return np.asarray(np.mean(values, axis=-1))


def median(values: Floats) -> Floats:
    """Over the last axis."""
    return np.asarray(np.median(values, axis=-1))


def resampled(values: Sequence[float], reducer: Reducer, seed: int = 0) -> Floats:
    """[RESAMPLES] the reducer's value on samples with replacement. Raises ValueError for no values."""
    return reducer(np.asarray(values, np.float64)[_draws(len(values), seed)])


def resampled_quotient(top: Sequence[float], bottom: Sequence[float], seed: int = 0) -> Floats:
    """[RESAMPLES] sum(top) / sum(bottom), where a sample draws pairs (top[i], bottom[i])."""
    draws = _draws(len(top), seed)
    return np.asarray(
        np.asarray(top, np.float64)[draws].sum(axis=-1) / np.asarray(bottom, np.float64)[draws].sum(axis=-1)
    )


def estimate(values: Sequence[float], reducer: Reducer) -> Estimate:
    """The reducer's value with its percentile interval."""
    samples = resampled(values, reducer)
    return around(float(reducer(np.asarray(values, np.float64))), samples)


def around(value: float, samples: Floats) -> Estimate:
    """A value with the percentile interval of its resamples."""
    low, high = np.quantile(samples, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def _draws(count: int, seed: int) -> NDArray[np.int64]:
    if not count:
        raise ValueError("expected at least one value, got none")
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
