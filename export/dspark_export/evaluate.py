"""How good a drafter is, from observed rounds: accepted length, conditional acceptance, threshold sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from dspark_backend.calibration import Calibration
from dspark_export.rounds import RoundTable

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))
"""0 to 0.95"""


@dataclass(frozen=True)
class AcceptedLength:
    """A row of the paper's Table 1."""

    name: str
    """The prompt file."""
    requests: int
    rounds: int
    accepted_length: float
    """Mean tokens a round yields: accepted drafts and the bonus token."""


@dataclass(frozen=True)
class ConditionalAcceptance:
    """How often a draft stood where all before it did (the paper's figure 2)."""

    position: int
    """From 1."""
    rate: float
    """nan where it was never reached."""
    count: int
    """Rounds that verified it and in which all before it stood."""


@dataclass(frozen=True)
class SweepRow:
    """What a confidence threshold would have done (the paper's figure 5)."""

    threshold: float
    accepted_length: float
    """Mean tokens a round yields, the bonus token among them."""
    verified_length: float
    """Mean tokens of a round's verification: the drafts, and the anchor before them."""

    @property
    def verified_per_accepted(self) -> float:
        """Verified tokens for each token gained; 1 is the least possible."""
        return self.verified_length / self.accepted_length


def accepted_lengths(rounds_by_file: Mapping[str, RoundTable]) -> list[AcceptedLength]:
    """One row a prompt file, in the order given."""
    return [
        AcceptedLength(name, rounds.num_requests, len(rounds), rounds.accepted_length)
        for name, rounds in rounds_by_file.items()
    ]


def conditional_acceptance(rounds: RoundTable) -> list[ConditionalAcceptance]:
    """One row a block position. Fair only for rounds whose depth did not depend on confidences (``fixed``)."""
    rows = []
    for index in range(rounds.block_size):
        reached = (rounds.verified > index) & (rounds.accepted >= index)
        count = int(reached.sum())
        rate = float((rounds.accepted[reached] > index).mean()) if count else math.nan
        rows.append(ConditionalAcceptance(index + 1, rate, count))
    return rows


def threshold_sweep(
    rounds: RoundTable, calibration: Calibration, thresholds: Sequence[float] = THRESHOLDS
) -> list[SweepRow]:
    """What policy ``threshold:P`` would have verified and accepted in rounds that verified whole blocks.

    Computed, not run: a round that verifies less accepts the same drafts up to that depth. (Run for real, later rounds
    would start at other anchors; their statistics are the same.) A round that verified less than its block, because its
    request was about to end, keeps that limit.
    """
    survival = calibration.survival(rounds.confidence_logits, rounds.sampled)
    rows = []
    for threshold in thresholds:
        # Survival never grows along a row: the slots that reach the threshold lead it.
        depth = np.minimum((survival >= threshold).sum(axis=1), rounds.verified)
        accepted = np.minimum(depth, rounds.accepted)
        rows.append(SweepRow(float(threshold), float(accepted.mean()) + 1.0, float(depth.mean()) + 1.0))
    return rows


def accepted_length_table(rows: Sequence[AcceptedLength]) -> Table:
    """Table 1: a row a prompt file, and the mean over files."""
    table = Table(title="Accepted length (tokens a round, bonus token included)")
    for heading in ("prompts", "requests", "rounds", "accepted length"):
        table.add_column(heading, justify="left" if heading == "prompts" else "right")
    for index, row in enumerate(rows):
        table.add_row(
            row.name,
            str(row.requests),
            str(row.rounds),
            f"{row.accepted_length:.3f}",
            end_section=index == len(rows) - 1,
        )
    if len(rows) > 1:
        mean = float(np.mean([row.accepted_length for row in rows]))
        table.add_row(
            "mean", str(sum(row.requests for row in rows)), str(sum(row.rounds for row in rows)), f"{mean:.3f}"
        )
    return table


def conditional_acceptance_table(rates: Mapping[str, Sequence[ConditionalAcceptance]]) -> Table:
    """Figure 2 in numbers: a row a prompt file, a column a position."""
    table = Table(title="Conditional acceptance by position")
    table.add_column("prompts")
    for position in range(1, max(map(len, rates.values()), default=0) + 1):
        table.add_column(str(position), justify="right")
    for name, row in rates.items():
        table.add_row(name, *("-" if math.isnan(cell.rate) else f"{cell.rate:.3f}" for cell in row))
    return table


def threshold_table(rows: Sequence[SweepRow]) -> Table:
    """Figure 5 in numbers."""
    table = Table(title="Threshold sweep")
    for heading in ("threshold", "accepted length", "verified tokens a round", "verified per accepted"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.threshold:.2f}",
            f"{row.accepted_length:.3f}",
            f"{row.verified_length:.3f}",
            f"{row.verified_per_accepted:.3f}",
        )
    return table
