"""How each product of a model is brought to int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.int8 import LEVELS

DIGIT = 2.0 * LEVELS
"""The second digit counts in units of this fraction of the first's, so that it spans the first one's rounding error."""


def fused_name(names: tuple[str, ...]) -> str:
    """One name for several projections that share an input and are computed as a single product."""
    return "+".join(names)


def fused_parts(name: str) -> tuple[str, ...]:
    """The projections that ``fused_name`` joined."""
    return tuple(name.split("+"))


@dataclass(frozen=True)
class LinearPlan:
    """One product ``x @ W``."""

    smoothing: FloatArray | None = None
    """float32 [K]: what each input channel is divided by, and its row of W multiplied with, before both are rounded
    (SmoothQuant, equation 3). The division is folded into whatever makes the channel, so that it costs nothing. None
    leaves the channels as they are."""
    two_digits: bool = False
    """Activations as two int8 digits, DIGIT times apart: rows whose channels differ by orders of magnitude need it."""
    gram: FloatArray | None = None
    """float32 [K, K]: of the smoothed inputs, for a rounding of W that makes up for its errors; None rounds to the
    nearest."""


@dataclass(frozen=True)
class Int8Plan:
    """Plans by the fused name of each product; those that are missing get the default."""

    linears: Mapping[str, LinearPlan] = field(default_factory=dict)
    default: LinearPlan = LinearPlan()

    def of(self, names: tuple[str, ...]) -> LinearPlan:
        return self.linears.get(fused_name(names), self.default)
