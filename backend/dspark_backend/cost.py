"""How long a round takes on the machine that serves: measured step times, and predictions between them.

The paper's SPS(B) is one curve. Here a step's time depends on the requests R and the cache's capacity C as well as on
the tokens B, so there is a curve for each measured pair, and the drafter's time beside them.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import ArtifactError

FORMAT_VERSION = 3

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_NOTHING = 1e-12
"""Seconds of what costs nothing: a curve holds positive times."""


@dataclass(frozen=True)
class StepCurve:
    """Measured times of steps with R requests of q tokens each (B = R * q) at one capacity.

    Raises:
        ArtifactError: q does not ascend, a time is not positive, or the sizes differ.
    """

    num_requests: int
    capacity: int
    """Rows of a slot."""
    tokens_each: tuple[int, ...]
    """q at the measured points, ascending."""
    seconds: tuple[float, ...]
    """Time at each point."""

    def __post_init__(self) -> None:
        where = f"cost curve of {self.num_requests!r} requests at capacity {self.capacity!r}"
        counts = (self.num_requests, self.capacity, *self.tokens_each)
        if any(type(count) is not int or count < 1 for count in counts):
            raise ArtifactError(f"{where}: expected whole numbers of at least 1, got {counts}")
        if not self.tokens_each or len(self.tokens_each) != len(self.seconds):
            raise ArtifactError(
                f"{where}: expected a time for each of at least one point, got {len(self.seconds)} for "
                f"{len(self.tokens_each)}"
            )
        if list(self.tokens_each) != sorted(set(self.tokens_each)):
            raise ArtifactError(f"{where}: expected ascending tokens_each, got {self.tokens_each}")
        if any(type(time) is not float or not 0 < time < math.inf for time in self.seconds):
            raise ArtifactError(f"{where}: expected positive seconds, got {self.seconds}")

    def at(self, tokens_each: FloatArray) -> FloatArray:
        """Seconds at q, float64 [n] -> [n]: linear between points, beyond the last with its slope, never falling."""
        inside: FloatArray = np.interp(tokens_each, self.tokens_each, self.seconds)
        if len(self.tokens_each) == 1:
            return inside
        rise = (self.seconds[-1] - self.seconds[-2]) / (self.tokens_each[-1] - self.tokens_each[-2])
        # Noise can make the last point the cheaper one; extrapolating that would end below zero.
        return inside + max(rise, 0.0) * np.maximum(tokens_each - self.tokens_each[-1], 0.0)


class _Surface:
    """Curves of several (R, C), and what lies between and beyond them."""

    def __init__(self, curves: Sequence[StepCurve]) -> None:
        self._capacities = sorted({curve.capacity for curve in curves})
        self._levels = [
            sorted((curve for curve in curves if curve.capacity == capacity), key=lambda curve: curve.num_requests)
            for capacity in self._capacities
        ]

    def at(self, num_requests: int, tokens_each: FloatArray, capacity: int) -> FloatArray:
        """Seconds at q, float64 [n] -> [n]."""
        if capacity <= self._capacities[0] or len(self._capacities) == 1:
            return self._on_level(0, num_requests, tokens_each)
        lower = min(bisect_right(self._capacities, capacity), len(self._capacities) - 1) - 1
        below, above = (self._on_level(level, num_requests, tokens_each) for level in (lower, lower + 1))
        return _line(self._capacities[lower], below, self._capacities[lower + 1], above, capacity)

    def _on_level(self, level: int, num_requests: int, tokens_each: FloatArray) -> FloatArray:
        curves = self._levels[level]
        measured = [curve.num_requests for curve in curves]
        most = measured[-1]
        if num_requests > most and level > 0:
            # Memory bounds what is measured at a large capacity. What it costs more than a small one grows with R.
            surcharge = curves[-1].at(tokens_each) - self._on_level(level - 1, most, tokens_each)
            beneath = self._on_level(level - 1, num_requests, tokens_each)
            return beneath + np.maximum(surcharge, 0.0) * (num_requests / most)
        if num_requests <= measured[0]:
            return curves[0].at(tokens_each)
        if len(curves) == 1:
            return curves[0].at(tokens_each * (num_requests / most))
        lower = min(bisect_right(measured, num_requests), len(measured) - 1) - 1
        # At equal q, not equal B: B tokens of fewer requests than measured would be left of where a curve begins.
        ends = curves[lower].at(tokens_each), curves[lower + 1].at(tokens_each)
        return _line(measured[lower], ends[0], measured[lower + 1], ends[1], num_requests)


def _line(x0: int, y0: FloatArray, x1: int, y1: FloatArray, x: int) -> FloatArray:
    """Through two points; beyond the second it does not fall."""
    if x <= x1:
        share = (x - x0) / (x1 - x0)
        return y0 * (1.0 - share) + y1 * share
    return y1 + np.maximum(y1 - y0, 0.0) * ((x - x1) / (x1 - x0))


@dataclass(frozen=True)
class CostModel:
    """Times of verification steps and drafting rounds.

    Between measured points predictions are linear: in B along a curve (which keeps its cliffs), in R at equal tokens a
    request, and in C. Beyond the last R, B or C they go on with the last slope, but never fall; below the first they
    stay. They are always positive.

    Raises:
        ArtifactError: no verify curve, or two of the same (R, C).
    """

    verify: tuple[StepCurve, ...]
    draft: tuple[StepCurve, ...] = ()
    """At q slots of a block for each request: one point where a round always drafts whole blocks; empty where there is
    no drafter."""
    uneven: tuple[StepCurve, ...] = ()
    """One point each, at the same (R, C) as verify curves: a step in which one request has q tokens and the others one
    each. Attention may work on as many places for everybody as the widest request needs."""

    def __post_init__(self) -> None:
        if not self.verify:
            raise ArtifactError("cost model: expected at least one verify curve, got none")
        for name, curves in (("verify", self.verify), ("draft", self.draft), ("uneven", self.uneven)):
            places = [(curve.num_requests, curve.capacity) for curve in curves]
            if len(set(places)) != len(places):
                raise ArtifactError(f"cost model: expected one {name} curve a (num_requests, capacity), got {places}")

        for curve in self.uneven:
            if curve.num_requests < 2 or len(curve.tokens_each) != 1 or curve.tokens_each[0] < 2:
                raise ArtifactError(
                    "cost model: expected uneven steps of two requests or more, one time each, the widest with two "
                    f"tokens or more, got {curve}"
                )

    @cached_property
    def _verify_surface(self) -> _Surface:
        return _Surface(self.verify)

    @cached_property
    def _draft_surface(self) -> _Surface:
        return _Surface(self.draft)

    @cached_property
    def _place_surface(self) -> _Surface | None:
        """Seconds that a place more costs which the widest request needs and the mean one does not; None: nothing."""
        if not self.uneven:
            return None
        # A single request is never uneven.
        curves = [StepCurve(1, capacity, (1,), (_NOTHING,)) for capacity in {one.capacity for one in self.uneven}]
        for one in self.uneven:
            count, (widest,), (seconds,) = one.num_requests, one.tokens_each, one.seconds
            mean = (count - 1 + widest) / count
            # Wider for one cannot take longer than as wide for all: what does was measured in a bad moment.
            even, wide = self._verify_surface.at(count, np.array([mean, widest]), one.capacity).tolist()
            seconds = min(seconds, wide)
            curves.append(StepCurve(count, one.capacity, (1,), (max((seconds - even) / (widest - mean), _NOTHING),)))
        return _Surface(curves)

    def verify_seconds(
        self, num_requests: int, token_counts: IntArray, capacity: int, widest: int | None = None
    ) -> FloatArray:
        """Predicted seconds of verification steps of R requests and B tokens, int64 [n] -> float64 [n].

        Args:
            widest: most tokens of one request; None for as many as the others.

        Raises:
            ValueError: no request, or fewer tokens than requests.
        """
        counts = np.asarray(token_counts, dtype=np.float64)
        if num_requests < 1 or (counts < num_requests).any():
            raise ValueError(f"expected a token or more for each of at least one request, got {num_requests} requests")
        each = counts / num_requests
        seconds = self._verify_surface.at(num_requests, each, capacity)
        if widest is None:
            return seconds
        return seconds + self.place_seconds(num_requests, capacity) * np.maximum(widest - each, 0.0)

    def place_seconds(self, num_requests: int, capacity: int) -> float:
        """What a step takes longer for every token that the widest request has more than the mean one."""
        surface = self._place_surface
        return 0.0 if surface is None else float(surface.at(num_requests, np.ones(1), capacity)[0])

    def draft_seconds(self, num_requests: int, capacity: int, width: int) -> float:
        """Predicted seconds of a drafting round of ``width`` slots a request; 0 without requests or drafter."""
        if num_requests < 1 or not self.draft:
            return 0.0
        return float(self._draft_surface.at(num_requests, np.full(1, float(width)), capacity)[0])

    def to_json(self) -> str:
        """Text from which :meth:`from_json` makes an equal model, to the last bit."""
        return json.dumps({"format_version": FORMAT_VERSION} | asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Read what :meth:`to_json` wrote.

        Raises:
            ArtifactError: not JSON, of another format, or with values that no measurement gives.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"cost model: expected JSON, got {error}") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version not in (None, FORMAT_VERSION):
            raise ArtifactError(
                f"cost model: expected format_version {FORMAT_VERSION}, got {version!r}; measure it again"
            )
        if not isinstance(raw, dict) or raw.keys() != {"format_version", "verify", "draft", "uneven"}:
            raise ArtifactError("cost model: expected an object with format_version, verify, draft and uneven")
        return cls(*(_curves(name, raw[name]) for name in ("verify", "draft", "uneven")))


def _curves(name: str, raw: Any) -> tuple[StepCurve, ...]:
    if not isinstance(raw, list):
        raise ArtifactError(f"cost model: {name}: expected a list of curves, got {type(raw).__name__}")
    curves = []
    for one in raw:
        if not isinstance(one, dict) or one.keys() != {"num_requests", "capacity", "tokens_each", "seconds"}:
            raise ArtifactError(
                f"cost model: {name}: expected curves with num_requests, capacity, tokens_each and seconds, got {one!r}"
            )
        if not isinstance(one["tokens_each"], list) or not isinstance(one["seconds"], list):
            raise ArtifactError(f"cost model: {name}: expected lists for tokens_each and seconds, got {one!r}")
        curves.append(StepCurve(one["num_requests"], one["capacity"], tuple(one["tokens_each"]), tuple(one["seconds"])))
    return tuple(curves)
