"""How true predicted probabilities are: reliability diagram, calibration error, ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dspark_backend.calibration import BoolArray, FloatArray

BINS = 10
"""Equal-width bins of the calibration errors and reliability diagrams that are printed."""


@dataclass(frozen=True)
class ReliabilityRow:
    """One bin of a reliability diagram."""

    mean_predicted: float
    observed_rate: float
    count: int


def reliability(predicted: FloatArray, observed: BoolArray, bins: int) -> list[ReliabilityRow]:
    """The bins of [0, 1] that hold predictions, ascending. ``predicted`` and ``observed`` are [N]."""
    place = np.minimum((predicted * bins).astype(np.intp), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = np.bincount(place, predicted, bins)
    hits = np.bincount(place, observed, bins)
    return [
        ReliabilityRow(float(sums[index] / counts[index]), float(hits[index] / counts[index]), int(counts[index]))
        for index in np.flatnonzero(counts)
    ]


def expected_calibration_error(predicted: FloatArray, observed: BoolArray, bins: int) -> float:
    """Mean over the predictions of |mean predicted - observed rate| of their bin; nan without any."""
    if not len(predicted):
        return math.nan
    place = np.minimum((predicted * bins).astype(np.intp), bins - 1)
    # Of the bins' sums: the count of each bin is its weight and its divisor at once.
    gaps = np.bincount(place, predicted - observed, bins)
    return float(np.abs(gaps).sum() / len(predicted))


def auc(score: FloatArray, observed: BoolArray) -> float:
    """Chance that a true case has a higher score than a false one, equal scores counting half; nan without both."""
    positives = int(np.count_nonzero(observed))
    negatives = len(observed) - positives
    if not positives or not negatives:
        return math.nan
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0  # mean rank of each distinct score, from 1
    total = float(ranks[inverse][observed].sum())
    return (total - positives * (positives + 1) / 2.0) / (positives * negatives)
