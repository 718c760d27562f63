"""From measured segments to the lines of the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_load import interval
from dspark_load.answer import Answer
from dspark_load.cell import Cell
from dspark_load.interval import Estimate
from dspark_load.limits import Limits
from dspark_load.segment import Segment
from dspark_load.throughput import measured

NOISE = 0.1
"""Cores: more of somebody else's work makes a segment doubtful."""


@dataclass(frozen=True)
class Row:
    """One cell."""

    cell: Cell
    answers: int
    per_user: Estimate
    """Tokens a second of one user after the first, median over answers."""
    aggregate: Estimate
    """Tokens a second of all users over the windows."""
    ttft_ms: Estimate
    itl_ms: Estimate
    """Medians over answers."""
    ttft_p90_ms: float
    met: float
    """Share of answers within the limits."""
    goodput: float
    """Requests a second within the limits."""
    accepted_length: float
    """Tokens a verification round, the target's own included."""
    budget: Estimate
    """Tokens that the target ran a round of a request, the anchor included; mean over answers."""
    noisy: int
    """Segments during which others used the machine."""


def by_cell(segments: Sequence[Segment]) -> dict[Cell, list[Segment]]:
    """In order of the first segment of each cell."""
    grouped: dict[Cell, list[Segment]] = defaultdict(list)
    for segment in segments:
        grouped[segment.cell].append(segment)
    return dict(grouped)


def rows(segments: Sequence[Segment], limits: Limits) -> list[Row]:
    """A row a cell."""
    return [_row(cell, mine, limits) for cell, mine in by_cell(segments).items()]


def _row(cell: Cell, segments: Sequence[Segment], limits: Limits) -> Row:
    answers = [answer for segment in segments for answer in segment.counted]
    met = sum(answer.meets(limits.ttft, limits.itl) for answer in answers) / len(answers)
    first = sorted(1e3 * answer.ttft for answer in answers)
    return Row(
        cell,
        len(answers),
        interval.estimate([answer.per_second for answer in answers], interval.median),
        measured(segments).estimate,
        interval.estimate(first, interval.median),
        interval.estimate([1e3 * answer.itl for answer in answers], interval.median),
        first[min(len(first) - 1, int(0.9 * len(first)))],
        met,
        met * request_rate(segments),
        sum(answer.tokens - 1 for answer in answers) / max(1, sum(answer.rounds for answer in answers)),
        interval.estimate([_budget(answer) for answer in answers], interval.mean),
        sum(segment.foreign_cores > NOISE for segment in segments),
    )


def request_rate(segments: Sequence[Segment]) -> float:
    """Requests a second: the tokens of the windows over the tokens of an answer."""
    per_answer = [answer.tokens for segment in segments for answer in segment.answers]
    tokens = sum(sum(segment.slices) for segment in segments)
    return tokens / sum(segment.seconds for segment in segments) / (sum(per_answer) / len(per_answer))


def _budget(answer: Answer) -> float:
    return 1.0 + answer.verified / max(1, answer.rounds)
