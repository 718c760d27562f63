"""From measured segments to the lines of the table of policies."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from speed.journal import Cell, Segment
from speed.load import Answer
from speed.quietness import NOISE


@dataclass(frozen=True)
class Row:
    """One cell. Ratios are NaN where the run has nothing to compare with."""

    cell: Cell
    answers: int
    per_user: float
    """Tokens a second of one stream, median over answers."""
    aggregate: float
    """Tokens a second of all streams, median over segments."""
    accepted_length: float
    """Tokens a verification round of a request, the target's own included."""
    budget: float
    """Tokens that the target ran a round of a request: the anchor and the drafts that the scheduler let through."""
    to_off: float
    """Speed of a stream over that of ``off``: decode times of the same prompts, median over segments."""
    to_fixed1: float
    first_token_ms: float
    """Median over answers."""
    noisy: int
    """Segments during which others used the machine."""


@dataclass(frozen=True)
class DomainRow:
    """One policy on the prompts of one domain, at one number of streams."""

    cell: Cell
    domain: str
    per_user: float
    accepted_length: float
    budget: float
    to_off: float


def rows(cells: Sequence[Cell], segments: Sequence[Segment]) -> list[Row]:
    """A row a cell, in the order given."""
    by_cell: dict[Cell, dict[int, Segment]] = defaultdict(dict)
    for segment in segments:
        by_cell[segment.cell][segment.part] = segment

    def ratio(cell: Cell, policy: str) -> float:
        mine, base = by_cell[cell], by_cell.get(Cell(cell.precision, policy, cell.streams), {})
        common = mine.keys() & base.keys()
        return statistics.median(base[part].decode_secs / mine[part].decode_secs for part in common) if common else nan

    nan = math.nan
    made = []
    for cell in cells:
        mine = list(by_cell[cell].values())
        answers = [answer for segment in mine for answer in segment.answers]
        made.append(
            Row(
                cell,
                len(answers),
                statistics.median(answer.per_second for answer in answers),
                statistics.median(segment.tokens / segment.seconds for segment in mine),
                _accepted_length(answers),
                _budget(answers),
                ratio(cell, "off"),
                ratio(cell, "fixed:1"),
                statistics.median(answer.first_token_ms for answer in answers),
                sum(segment.foreign_cores > NOISE for segment in mine),
            )
        )
    return made


def domain_rows(cells: Sequence[Cell], segments: Sequence[Segment], streams: int) -> list[DomainRow]:
    """A row a policy and domain, at ``streams``."""
    answers: dict[tuple[Cell, str], list[Answer]] = defaultdict(list)
    for segment in segments:
        for answer in segment.answers:
            answers[segment.cell, answer.prompt.partition("/")[0]].append(answer)

    made = []
    for (cell, domain), mine in answers.items():
        if cell.streams != streams or cell not in cells:
            continue
        base = answers.get((Cell(cell.precision, "off", streams), domain), [])
        seconds = sum(answer.decode_secs for answer in mine)
        ratio = sum(answer.decode_secs for answer in base) / seconds if len(base) == len(mine) else math.nan
        speed = statistics.median(answer.per_second for answer in mine)
        made.append(DomainRow(cell, domain, speed, _accepted_length(mine), _budget(mine), ratio))
    return sorted(made, key=lambda row: (cells.index(row.cell), row.domain))


def unequal_prompts(segments: Sequence[Segment]) -> tuple[int, int]:
    """(prompts whose greedy answers differ between the cells of a precision, prompts in all precisions)."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for segment in segments:
        for answer in segment.answers:
            seen[segment.cell.precision, answer.prompt].add(answer.tokens_hash)
    return sum(len(hashes) > 1 for hashes in seen.values()), len(seen)


def _accepted_length(answers: Sequence[Answer]) -> float:
    return sum(answer.output_tokens - 1 for answer in answers) / max(1, sum(answer.rounds for answer in answers))


def _budget(answers: Sequence[Answer]) -> float:
    return 1 + sum(answer.verified for answer in answers) / max(1, sum(answer.rounds for answer in answers))
