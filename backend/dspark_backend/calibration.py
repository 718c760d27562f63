"""Sequential temperature scaling: confidence logits to survival probabilities that are true (DESIGN, "STS").

A drafter's sigmoid(z_k) estimates the chance that draft k is accepted given that all before it were. The scheduler
multiplies them into the survival of a whole prefix, where overconfidence compounds; one temperature and one bias a
position, fitted left to right on observed rounds (``calibration_fit``), correct it. The bias is ours: the head learned
1 - TV, the chance that a draw is accepted, and no temperature makes a greedy request's chance of it. Hence two tables,
greedy and sampled.

R requests, g the block size; position k is the k-th draft, index k - 1.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import ArtifactError

CALIBRATION_FILE = "calibration.json"
"""Lies beside a drafter's stage.json. Optional: no file means no correction."""
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
