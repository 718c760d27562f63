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
    """Of the window, in seconds from the first request; a closed loop has all its streams busy up to here."""
    slices: list[int]
    """Tokens that arrived in each of equal slices of the window."""
    foreign_cores: float = 0.0
    """Cores that others kept busy meanwhile."""
    begin: float = 0.0
    """Of the window: in a closed loop the first answer's end. Before it all streams were at their beginnings."""

    @property
    def seconds(self) -> float:
        """Of the window."""
        return self.end - self.begin

    @property
    def aggregate(self) -> float:
        """Tokens a second of all users."""
        return sum(self.slices) / self.seconds

    @property
    def counted(self) -> list[Answer]:
        """Answers made under the load; the others ran while a closed loop began or ran dry. All where none
        qualifies."""
        inside = [answer for answer in self.answers if _share(answer, self.begin, self.end) >= INSIDE]
        return inside or self.answers


def reduce(cell: Cell, part: int, profile: Profile, foreign_cores: float = 0.0) -> Segment:
    """The segment of one profile."""
    begin, end = window(profile.answers) if cell.load.mode == "closed" else (0.0, max(a.last for a in profile.answers))
    return Segment(cell, part, profile.answers, end, slices(profile.arrivals, begin, end), foreign_cores, begin)


def window(answers: Sequence[Answer]) -> tuple[float, float]:
    """Of a closed loop: from the first answer's end until a stream ended for which no new request was left.

    All streams begin together, with their prompts: what comes before the first end is a crowd, not a load.
    """
    last_start = max(answer.sent for answer in answers)
    end = min(answer.last for answer in answers if answer.last > last_start)
    begin = min(answer.last for answer in answers)
    return (begin if begin < end else 0.0), end


def slices(arrivals: Sequence[tuple[float, int]], begin: float, end: float) -> list[int]:
    """Tokens by slice of what comes behind ``begin``, up to ``end``."""
    counts = [0] * SLICES
    for when, tokens in arrivals:
        if begin < when <= end:
            counts[min(SLICES - 1, int((when - begin) / (end - begin) * SLICES))] += tokens
    return counts


def _share(answer: Answer, begin: float, end: float) -> float:
    if answer.decode_secs <= 0:
        return 1.0 if begin < answer.last <= end else 0.0
    return max(0.0, min(answer.last, end) - max(answer.first, begin)) / answer.decode_secs
