"""Estimates with bootstrap confidence intervals."""

from __future__ import annotations

import statistics
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


def resampled(values: Sequence[float], reducer: Reducer, seed: int = 0, sizes: Sequence[int] = ()) -> Floats:
    """[RESAMPLES] the reducer's value on samples with replacement. Raises ValueError for no values.

    Args:
        sizes: how many of the values, in order, belong to each part of the run; none: they are of one part.
    """
    return reducer(np.asarray(values, np.float64)[_draws(sizes or (len(values),), seed)])


def resampled_quotient(
    top: Sequence[float], bottom: Sequence[float], seed: int = 0, sizes: Sequence[int] = ()
) -> Floats:
    """[RESAMPLES] sum(top) / sum(bottom), where a sample draws pairs (top[i], bottom[i])."""
    draws = _draws(sizes or (len(top),), seed)
    return np.asarray(
        np.asarray(top, np.float64)[draws].sum(axis=-1) / np.asarray(bottom, np.float64)[draws].sum(axis=-1)
    )


def estimate(values: Sequence[float], reducer: Reducer, sizes: Sequence[int] = ()) -> Estimate:
    """The reducer's value with its percentile interval."""
    samples = resampled(values, reducer, sizes=sizes)
    return around(float(reducer(np.asarray(values, np.float64))), samples)


def quotient(top: Sequence[float], bottom: Sequence[float], sizes: Sequence[int] = ()) -> Estimate:
    """sum(top) / sum(bottom) with its percentile interval."""
    return around(sum(top) / sum(bottom), resampled_quotient(top, bottom, sizes=sizes))


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's distribution, to half a percent from 4 degrees of freedom on (Cornish and Fisher,
    three terms)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def around(value: float, samples: Floats) -> Estimate:
    """A value with the percentile interval of its resamples."""
    low, high = np.quantile(samples, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def _draws(sizes: Sequence[int], seed: int) -> NDArray[np.int64]:
    """[RESAMPLES, values] indices: parts are drawn first, then values of each, both with replacement.

    What slows the machine slows all answers of a part, so that answers alone would tell a fraction of the spread. Which
    parts are drawn depends on their number, not on the seed: policies that were measured in the same parts are compared
    in the same.
    """
    counts = np.asarray(sizes, np.int64)
    if not counts.size or counts.min() < 1:
        raise ValueError("expected at least one value, got none")
    parts = np.random.default_rng(0).integers(0, counts.size, (RESAMPLES, counts.size))
    of_place = np.repeat(parts, counts, axis=1)
    within = np.random.default_rng((1, seed)).random(of_place.shape) * counts[of_place]
    return np.asarray((np.cumsum(counts) - counts)[of_place] + within.astype(np.int64))
