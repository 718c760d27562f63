"""The two questions of the report: do the schedulers lose throughput to any policy, and what does a user gain?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_load.cell import Load
from dspark_load.interval import Estimate
from dspark_load.row import Row, by_cell
from dspark_load.segment import Segment
from dspark_load.throughput import measured

OURS = ("causal", "lagged")
BASES = ("off", "fixed:1")
LEVELS = 5


@dataclass(frozen=True)
class AgainstBest:
    """A scheduler's aggregate tokens/s over that of the best policy that is none, at one load."""

    load: Load
    policy: str
    best: str
    ratio: Estimate


def against_best(segments: Sequence[Segment]) -> list[AgainstBest]:
    """For every closed loop and scheduler; loads without another policy are left out.

    In an open loop all policies that keep up have the throughput of the arrivals.
    """
    grouped = by_cell([segment for segment in segments if segment.cell.load.mode == "closed"])
    found = []
    for load in sorted({cell.load for cell in grouped}):
        speeds = {
            cell.policy: measured(mine, seed) for seed, (cell, mine) in enumerate(grouped.items()) if cell.load == load
        }
        others = [policy for policy in speeds if policy not in OURS]
        if others:
            best = max(others, key=lambda policy: speeds[policy].value)
            found += [
                AgainstBest(load, policy, best, speeds[policy].over(speeds[best]))
                for policy in OURS
                if policy in speeds
            ]
    return found


@dataclass(frozen=True)
class Matched:
    """How much faster a user is served than by a base at equal throughput. Ratios at LEVELS of tokens/s."""

    policy: str
    base: str
    levels: tuple[float, ...]
    """Aggregate tokens/s, evenly over the stretch that both curves cover; none where they have none in common."""
    ratios: tuple[float, ...]


Point = tuple[float, float]
"""(aggregate tokens/s, tokens/s of a user)."""


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, by rising throughput."""
    kept: list[Point] = []
    for point in sorted(points, reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def curve(rows: Sequence[Row], policy: str) -> list[Point]:
    """The frontier of a policy's closed loops."""
    mine = [row for row in rows if row.cell.policy == policy and row.cell.load.mode == "closed"]
    return frontier([(row.aggregate.value, row.per_user.value) for row in mine])


def at(points: Sequence[Point], level: float) -> float:
    """Speed of a user at this throughput, between the curve's points by straight lines."""
    return float(np.interp(level, [point[0] for point in points], [point[1] for point in points]))


def matched(rows: Sequence[Row]) -> list[Matched]:
    """Every scheduler against every base that was measured."""
    found = []
    for policy in OURS:
        for base in BASES:
            ours, theirs = curve(rows, policy), curve(rows, base)
            if not ours or not theirs:
                continue
            low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
            levels = tuple(float(level) for level in np.linspace(low, high, LEVELS)) if low <= high else ()
            ratios = tuple(at(ours, level) / at(theirs, level) for level in levels)
            found.append(Matched(policy, base, levels, ratios))
    return found
