"""Sequential temperature scaling: confidence logits to survival probabilities that are true (DESIGN, "STS").

A drafter's sigmoid(z_k) estimates the chance that draft k is accepted given that all before it were. The scheduler
multiplies them into the survival of a whole prefix, where overconfidence compounds; one temperature and one bias a
position, fitted left to right on observed rounds, correct it. The bias is ours: the head learned 1 - TV, the chance
that a draw is accepted, and no temperature makes a greedy request's chance of it. Hence two tables, greedy and sampled.

R requests, N observed rounds, g the block size; position k is the k-th draft, index k - 1.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import ArtifactError

CALIBRATION_FILE = "calibration.json"
"""Lies beside a drafter's stage.json. Optional: no file means no correction."""
BINS = 10
"""Equal-width bins of the calibration errors that ``fit`` minimises."""
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

_FORMAT_VERSION = 2
_HINT = "run dspark-export calibrate again, or delete the file to do without calibration"
_LOWEST = -700.0
"""exp of its negative is still a finite float64."""

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]

log = logging.getLogger(__name__)


def sigmoid(logits: FloatArray) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) in float64, without warnings at the ends; NaN counts as certain rejection."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.fmax(logits, _LOWEST, dtype=np.float64))))


@dataclass(frozen=True)
class Scaling:
    """Temperatures and biases of one sampling regime, one a block position: sigmoid(z / T + b).

    Raises:
        ValueError: they are not equally many, a temperature is not positive and finite, or a bias not finite.
    """

    temperatures: tuple[float, ...]
    biases: tuple[float, ...] = ()
    """None given: zeros."""

    def __post_init__(self) -> None:
        if not self.biases:
            object.__setattr__(self, "biases", (0.0,) * len(self.temperatures))
        if len(self.biases) != len(self.temperatures):
            raise ValueError(
                f"expected as many biases as temperatures, got {len(self.biases)} and {len(self.temperatures)}"
            )
        for temperature in self.temperatures:
            if not 0.0 < temperature < math.inf:
                raise ValueError(f"expected positive finite temperatures, got {temperature}")
        for bias in self.biases:
            if not math.isfinite(bias):
                raise ValueError(f"expected finite biases, got {bias}")

    @classmethod
    def identity(cls, block_size: int) -> Scaling:
        """Temperature 1, bias 0."""
        return cls((1.0,) * block_size)

    def __len__(self) -> int:
        return len(self.temperatures)


@dataclass(frozen=True)
class Calibration:
    """What corrects the confidences of one drafter. ``identity`` makes one that changes nothing.

    Raises:
        ValueError: the regimes are empty or of different lengths.
    """

    greedy: Scaling
    """For requests at temperature 0."""
    sampled: Scaling
    """For all others."""
    drafter_hash: str = ""
    """source_hash of the drafter that it was fitted for."""
    notes: tuple[str, ...] = ()
    """What the fit could not do."""

    def __post_init__(self) -> None:
        if len(self.greedy) != len(self.sampled) or not len(self.greedy):
            raise ValueError(
                f"expected as many greedy temperatures as sampled ones, at least one, got {len(self.greedy)} and "
                f"{len(self.sampled)}"
            )

    @classmethod
    def identity(cls, block_size: int, drafter_hash: str = "") -> Calibration:
        """Temperature 1 and bias 0 everywhere."""
        return cls(Scaling.identity(block_size), Scaling.identity(block_size), drafter_hash)

    @property
    def block_size(self) -> int:
        return len(self.greedy)

    @cached_property
    def _inverse(self) -> NDArray[np.float64]:
        """[2, g]: 1 / T, greedy first."""
        return 1.0 / np.array([self.greedy.temperatures, self.sampled.temperatures])

    @cached_property
    def _bias(self) -> NDArray[np.float64]:
        """[2, g]: b, greedy first."""
        return np.array([self.greedy.biases, self.sampled.biases])

    def survival(self, confidence_logits: FloatArray, sampled: BoolArray) -> NDArray[np.float64]:
        """Probability that drafts 1 .. k all stand: float64 [R, m] in [0, 1], never growing along a row.

        ``confidence_logits`` is float32 [R, m], m at most the block size; ``sampled`` [R] tells which requests have a
        temperature above 0.
        """
        regime = sampled.astype(np.intp)
        places = slice(confidence_logits.shape[1])
        conditional = sigmoid(confidence_logits * self._inverse[regime, places] + self._bias[regime, places])
        return np.cumprod(conditional, axis=1, out=conditional)

    def save(self, path: Path) -> None:
        """Write JSON."""
        content = {"format_version": _FORMAT_VERSION, "block_size": self.block_size, **asdict(self)}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, block_size: int, drafter_hash: str) -> Calibration:
        """Read what ``save`` wrote, for the drafter with this block size and source_hash.

        Raises:
            ArtifactError: the file is missing or damaged, or belongs to another drafter.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: expected a calibration, found no file; {_HINT}") from error
        except ValueError as error:
            raise ArtifactError(f"{path}: expected JSON, got {error}; {_HINT}") from error
        if not isinstance(raw, dict) or raw.get("format_version") != _FORMAT_VERSION:
            found = raw.get("format_version") if isinstance(raw, dict) else type(raw).__name__
            raise ArtifactError(f"{path}: expected format_version {_FORMAT_VERSION}, got {found!r}; {_HINT}")
        try:
            calibration = cls(
                greedy=_scaling(raw["greedy"]),
                sampled=_scaling(raw["sampled"]),
                drafter_hash=str(raw["drafter_hash"]),
                notes=tuple(str(note) for note in raw["notes"]),
            )
        except KeyError as error:
            raise ArtifactError(f"{path}: expected the key {error}, which is missing; {_HINT}") from error
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: {error}; {_HINT}") from error
        if calibration.block_size != block_size:
            raise ArtifactError(
                f"{path}: expected {block_size} temperatures, the drafter's block size, got {calibration.block_size}; "
                f"{_HINT}"
            )
        if calibration.drafter_hash != drafter_hash:
            raise ArtifactError(
                f"{path}: expected a calibration of the drafter with source hash {drafter_hash[:12]}, got one of "
                f"{calibration.drafter_hash[:12] or 'no stated drafter'}; {_HINT}"
            )
        return calibration


def _scaling(raw: Any) -> Scaling:
    if not isinstance(raw, dict):
        raise TypeError(f"expected an object with temperatures and biases, got {raw!r}")
    values = (tuple(float(value) for value in raw[name]) for name in ("temperatures", "biases"))
    return Scaling(*values)


def load_calibration(directory: Path, block_size: int, drafter_hash: str) -> Calibration:
    """The calibration beside a drafter's artifact; the identity, with a note in the log, where there is none.

    Raises:
        ArtifactError: as ``Calibration.load``.
    """
    path = directory / CALIBRATION_FILE
    if path.exists():
        return Calibration.load(path, block_size, drafter_hash)
    log.info("%s has no %s: confidences are used as they are; dspark-export calibrate makes one", directory, path.name)
    return Calibration.identity(block_size, drafter_hash)


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


@dataclass
class OnlineCalibration:
    """How far predictions are off at present: running means of predicted and observed acceptance of each position.

    Older drafts are forgotten exponentially. Costs a few microseconds an update.
    """

    block_size: int
    half_life: float = 500.0
    """Verified drafts of a position after which an older one counts half."""
    _sums: NDArray[np.float64] = field(init=False, repr=False)
    """[3, g]: weights, predicted survival, observed acceptance."""

    def __post_init__(self) -> None:
        self._sums = np.zeros((3, self.block_size))

    def update(self, survival: FloatArray, verified: IntArray, accepted: IntArray) -> None:
        """Add a step's rounds: predicted ``survival`` [R, g]; drafts ``verified`` and ``accepted`` [R]."""
        index = np.arange(self.block_size)
        seen = index < np.asarray(verified)[:, None]
        stood = index < np.asarray(accepted)[:, None]
        counts = seen.sum(axis=0)
        self._sums *= 0.5 ** (counts / self.half_life)
        self._sums += (counts, (survival * seen).sum(axis=0), (stood & seen).sum(axis=0))

    @property
    def errors(self) -> NDArray[np.float64]:
        """|mean predicted - mean observed| of each position, float64 [g]; nan where nothing was verified."""
        weights, predicted, observed = self._sums
        gaps = np.full(self.block_size, np.nan)
        return np.divide(np.abs(predicted - observed), weights, out=gaps, where=weights > 0.0)

    @property
    def error(self) -> float:
        """Mean of ``errors``, each position weighing as much as it was verified; 0 before anything was."""
        weights, predicted, observed = self._sums
        total = float(weights.sum())
        return float(np.abs(predicted - observed).sum() / total) if total else 0.0
