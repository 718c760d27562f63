"""From measured segments to the lines of the table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_load import interval
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
    requests: float
    """Requests a second: an open loop's arrivals, a closed loop's answers."""
    met: float
    """Share of answers within the limits."""
    goodput: float
    """Requests a second within the limits."""
    accepted_length: float
    """Tokens a verification round, the target's own included."""
    budget: Estimate
    """Tokens that the target ran a round of a request, the anchor included."""
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
    counted = [segment.counted for segment in segments]
    sizes = [len(part) for part in counted]
    answers = [answer for part in counted for answer in part]
    met = sum(answer.meets(limits.ttft, limits.itl) for answer in answers) / len(answers)
    requests = request_rate(segments)
    first = [1e3 * answer.ttft for answer in answers]
    rounds = [max(1, answer.rounds) for answer in answers]
    run = [own + answer.verified for own, answer in zip(rounds, answers, strict=True)]
    return Row(
        cell,
        len(answers),
        interval.estimate([answer.per_second for answer in answers], interval.median, sizes),
        measured(segments).estimate,
        interval.estimate(first, interval.median, sizes),
        interval.estimate([1e3 * answer.itl for answer in answers], interval.median, sizes),
        float(np.quantile(first, 0.9)),
        requests,
        met,
        met * requests,
        sum(answer.tokens - 1 for answer in answers) / sum(rounds),
        interval.quotient(run, rounds, sizes),
        sum(segment.foreign_cores > NOISE for segment in segments),
    )


def request_rate(segments: Sequence[Segment]) -> float:
    """Requests a second. Of an open loop: its arrivals, for the time until the last answer ended is the server's, not
    the users'. Of a closed one: the tokens of the windows over the tokens of an answer."""
    if segments[0].cell.load.mode == "open":
        sent = [sorted(answer.sent for answer in segment.answers) for segment in segments]
        seconds = sum(times[-1] - times[0] for times in sent)
        return sum(len(times) - 1 for times in sent) / seconds if seconds else math.nan
    per_answer = [answer.tokens for segment in segments for answer in segment.answers]
    tokens = sum(sum(segment.slices) for segment in segments)
    return tokens / sum(segment.seconds for segment in segments) / (sum(per_answer) / len(per_answer))
