"""One measured stretch: a cell on one part of the prompts, reduced to what the report needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_load.answer import Answer
from dspark_load.cell import Cell
from dspark_load.profile_export import Profile

SLICES = 8
INSIDE = 0.8
"""Least share of an answer's decoding inside the window for the answer to count as one of the load's users."""


@dataclass(frozen=True)
class Segment:
    """Counts and times of one run of the tool."""

    cell: Cell
    part: int
    answers: list[Answer]
    end: float
    """Of the window, in seconds from the first request; a closed loop has all its streams busy from 0 to here."""
    slices: list[int]
    """Tokens that arrived in each of equal slices of the window."""
    foreign_cores: float = 0.0
    """Cores that others kept busy meanwhile."""

    @property
    def aggregate(self) -> float:
        """Tokens a second of all users."""
        return sum(self.slices) / self.end

    @property
    def counted(self) -> list[Answer]:
        """Answers made under the load; the others ran while a closed loop ran dry. All where none qualifies."""
        inside = [answer for answer in self.answers if _share(answer, self.end) >= INSIDE]
        return inside or self.answers


def reduce(cell: Cell, part: int, profile: Profile, foreign_cores: float = 0.0) -> Segment:
    """The segment of one profile."""
    end = window_end(profile.answers) if cell.load.mode == "closed" else max(a.last for a in profile.answers)
    return Segment(cell, part, profile.answers, end, slices(profile.arrivals, end), foreign_cores)


def window_end(answers: Sequence[Answer]) -> float:
    """When the first stream of a closed loop ended for which no new request was left."""
    last_start = max(answer.sent for answer in answers)
    return min(answer.last for answer in answers if answer.last > last_start)


def slices(arrivals: Sequence[tuple[float, int]], end: float) -> list[int]:
    """Tokens by slice of [0, end]."""
    counts = [0] * SLICES
    for when, tokens in arrivals:
        if when <= end:
            counts[min(SLICES - 1, int(when / end * SLICES))] += tokens
    return counts


def _share(answer: Answer, end: float) -> float:
    if answer.decode_secs <= 0:
        return 1.0 if answer.last <= end else 0.0
    return max(0.0, min(answer.last, end) - answer.first) / answer.decode_secs
