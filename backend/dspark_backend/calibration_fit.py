"""Fits temperatures and biases to observed rounds (DESIGN, "STS").

N observed rounds, g the block size; position k is the k-th draft, index k - 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dspark_backend.calibration import BoolArray, FloatArray, IntArray, Scaling, sigmoid

MIN_ROUNDS = 50
"""A position with fewer observed rounds keeps temperature 1."""
GRID = np.logspace(-1.0, 1.0, 41)
"""Temperatures to choose from, 0.1 to 10."""
BIASES = np.round(np.linspace(-3.0, 3.0, 61), 1)
"""Biases to choose from, in units of the scaled logit."""
_COARSE = 5
"""Every so many of both are tried first, then all around the best: the loss has one valley."""
_SURE = 1e-6
"""Least and most probability that an observation is held against."""


@dataclass(frozen=True)
class ScalingFit:
    """Result of ``fit``."""

    scaling: Scaling
    notes: tuple[str, ...]
    """One for each position that had too few rounds."""


def fit(confidence_logits: FloatArray, accepted_counts: IntArray, verified_depths: IntArray) -> ScalingFit:
    """Fit one temperature and bias a position, left to right, earlier ones fixed.

    (T_k, b_k) are those of ``GRID`` and ``BIASES`` that make accepted >= k likeliest under the survival of position k,
    over the rounds that verified k drafts or more; of equally likely ones those closest to (1, 0).
    ``confidence_logits`` is [N, g], the others [N]. Rounds should be of a policy ``fixed``: one that looks at the
    confidences shows only what it trusted.

    Likelihood, where STS takes the calibration error of ten bins: that one is about as low for a slope far off, as long
    as each bin's mean fits, and jumps with single rounds.

    Raises:
        ValueError: the shapes do not agree, or a round accepted more than it verified.
    """
    rounds, block = confidence_logits.shape
    if accepted_counts.shape != (rounds,) or verified_depths.shape != (rounds,):
        raise ValueError(
            f"expected accepted_counts and verified_depths of shape ({rounds},), got {accepted_counts.shape} and "
            f"{verified_depths.shape}"
        )
    if (accepted_counts > verified_depths).any():
        raise ValueError("expected no round with more accepted than verified drafts")
    before = np.ones(rounds)
    temperatures, biases, notes = [], [], []
    for index in range(block):
        usable = verified_depths > index
        logits, observed = confidence_logits[:, index], accepted_counts[usable] > index
        temperature, bias = 1.0, 0.0
        if observed.size < MIN_ROUNDS:
            notes.append(
                f"position {index + 1}: {observed.size} rounds, fewer than {MIN_ROUNDS}; its temperature stays 1"
            )
        else:
            temperature, bias = _likeliest(before[usable], logits[usable], observed)
        temperatures.append(temperature)
        biases.append(bias)
        before = before * sigmoid(logits / temperature + bias)
    return ScalingFit(Scaling(tuple(temperatures), tuple(biases)), tuple(notes))


def _likeliest(prefix: FloatArray, logits: FloatArray, observed: BoolArray) -> tuple[float, float]:
    """Temperature and bias of one position; all [N]."""

    def loss(place: tuple[int, int]) -> float:
        survival = np.clip(prefix * sigmoid(logits / GRID[place[0]] + BIASES[place[1]]), _SURE, 1.0 - _SURE)
        # Rounded, so that ties are ties in spite of the last bits of a sum.
        return round(float(-np.log(np.where(observed, survival, 1.0 - survival)).mean()), 12)

    def best(hotter: Iterable[int], biased: Iterable[int]) -> tuple[int, int]:
        places = itertools.product(hotter, biased)
        return min(places, key=lambda place: (loss(place), abs(math.log(GRID[place[0]])), abs(BIASES[place[1]])))

    hot, biased = best(range(0, len(GRID), _COARSE), range(0, len(BIASES), _COARSE))
    near = [
        range(max(0, one - _COARSE + 1), min(len(many), one + _COARSE)) for one, many in ((hot, GRID), (biased, BIASES))
    ]
    hot, biased = best(*near)
    return float(GRID[hot]), float(BIASES[biased])
