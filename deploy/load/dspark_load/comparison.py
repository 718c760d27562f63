"""The two questions of the report: do the schedulers lose throughput to any policy, and what does a user gain?"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_load import interval
from dspark_load.cell import Load
from dspark_load.interval import Estimate, Floats
from dspark_load.row import by_cell
from dspark_load.segment import Segment
from dspark_load.throughput import measured

OURS = ("causal", "lagged")
BASES = ("off", "fixed:1")
LEVELS = 5
MIN_PARTS = 5


@dataclass(frozen=True)
class AgainstBest:
    """A scheduler's aggregate tokens/s over that of the best policy that is none, at one load."""

    load: Load
    policy: str
    best: str
    ratio: Estimate


def against_best(segments: Sequence[Segment]) -> list[AgainstBest]:
    """For every closed loop and scheduler; loads without another policy are left out. Means are geometric, over parts.

    In an open loop all policies that keep up have the throughput of the arrivals.
    """
    grouped = by_cell([segment for segment in segments if segment.cell.load.mode == "closed"])
    found = []
    for load in sorted({cell.load for cell in grouped}):
        cells = {cell.policy: mine for cell, mine in grouped.items() if cell.load == load}
        others = [policy for policy in cells if policy not in OURS]
        if others:
            common = set.intersection(*({segment.part for segment in cells[policy]} for policy in others))
            best = max(others, key=lambda policy: _level(cells[policy], common))
            found += [
                AgainstBest(load, policy, best, quotient(cells[policy], cells[best]))
                for policy in OURS
                if policy in cells
            ]
    return found


def _level(segments: Sequence[Segment], parts: set[int]) -> float:
    """Mean logarithm of tokens/s in all, over these parts, or over all where that is none."""
    return statistics.fmean(math.log(segment.aggregate) for segment in segments if not parts or segment.part in parts)


def quotient(ours: Sequence[Segment], theirs: Sequence[Segment]) -> Estimate:
    """Tokens/s in all of one policy over another's: the geometric mean of the parts' ratios.

    A part asks both the same prompts, minutes apart, so that its ratio is one observation: from MIN_PARTS on the
    interval is Student's, of their logarithms. Fewer would say little, and answers are resampled, too, as if both had
    had others.
    """
    mine, base = ({segment.part: segment.aggregate for segment in some} for some in (ours, theirs))
    common = sorted(mine.keys() & base.keys())
    if not common:
        return measured(ours, 0).over(measured(theirs, 1))
    logs = [math.log(mine[part] / base[part]) for part in common]
    value = math.exp(statistics.fmean(logs))
    if len(common) >= MIN_PARTS:
        reach = interval.student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        return Estimate(value, value * math.exp(-reach), value * math.exp(reach))
    ours, theirs = ([segment for segment in some if segment.part in common] for some in (ours, theirs))
    pooled = measured(ours, 0).over(measured(theirs, 1))
    shift = value / pooled.value
    return Estimate(value, pooled.low * shift, pooled.high * shift)


@dataclass(frozen=True)
class Matched:
    """How much faster a user is served than by a base at equal throughput. Ratios at LEVELS of tokens/s."""

    policy: str
    base: str
    levels: tuple[float, ...]
    """Aggregate tokens/s, evenly over the stretch that both curves cover; none where they have none in common."""
    ratios: tuple[float, ...]
    gain: Estimate | None
    """Median of the ratios; resamples in which the curves have nothing in common are left out of its interval."""


Point = tuple[float, float]
"""(aggregate tokens/s, tokens/s of a user)."""


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, by rising throughput."""
    kept: list[Point] = []
    for point in sorted(points, reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def at(points: Sequence[Point], levels: Sequence[float]) -> list[float]:
    """Speeds of a user at these throughputs, between the curve's points by straight lines."""
    speeds: list[float] = np.interp(levels, [point[0] for point in points], [point[1] for point in points]).tolist()
    return speeds


def along(ours: Sequence[Point], theirs: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Levels of throughput that the frontiers of both reach, and how much faster a user of ours is at each."""
    ours, theirs = frontier(ours), frontier(theirs)
    low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
    if low > high:
        return [], []
    levels: list[float] = np.linspace(low, high, LEVELS).tolist()
    pairs = zip(at(ours, levels), at(theirs, levels), strict=True)
    return levels, [mine / base for mine, base in pairs]


@dataclass(frozen=True)
class Curve:
    """The closed loops of a policy."""

    points: list[Point]
    samples: list[list[Point]]
    """Bootstrap draws of them."""


def curves(segments: Sequence[Segment]) -> dict[str, Curve]:
    """Of every policy. Throughput and speed of a point are of the same drawn answers."""
    grouped = by_cell([segment for segment in segments if segment.cell.load.mode == "closed"])
    found: dict[str, list[tuple[Point, Floats]]] = defaultdict(list)
    for seed, (cell, mine) in enumerate(grouped.items()):
        counted = [segment.counted for segment in mine]
        speeds = [answer.per_second for part in counted for answer in part]
        total = measured(mine, seed)
        users = interval.resampled(speeds, interval.median, seed, [len(part) for part in counted])
        point = (total.value, float(np.median(speeds)))
        found[cell.policy].append((point, np.stack([total.samples, users], axis=1)))
    return {
        policy: Curve(
            [point for point, _ in mine],
            [[(float(x), float(y)) for x, y in draw] for draw in np.stack([drawn for _, drawn in mine], axis=1)],
        )
        for policy, mine in found.items()
    }


def matched(segments: Sequence[Segment]) -> list[Matched]:
    """Every scheduler against every base that was measured."""
    known, found = curves(segments), []
    for policy in OURS:
        for base in BASES:
            if policy not in known or base not in known:
                continue
            ours, theirs = known[policy], known[base]
            levels, ratios = along(ours.points, theirs.points)
            drawn = [along(*pair)[1] for pair in zip(ours.samples, theirs.samples, strict=True)] if ratios else []
            medians = np.array([statistics.median(one) for one in drawn if one])
            gain = interval.around(statistics.median(ratios), medians) if medians.size else None
            found.append(Matched(policy, base, tuple(levels), tuple(ratios), gain))
    return found
