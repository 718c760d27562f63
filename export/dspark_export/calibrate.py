"""Fitting a drafter's confidences to observed rounds, and how much better they are for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.table import Table

from dspark_backend.calibration import Calibration, Scaling
from dspark_backend.calibration_fit import fit
from dspark_backend.reliability import BINS, ReliabilityRow, auc, expected_calibration_error, reliability
from dspark_export.rounds import RoundTable

Regime = Literal["greedy", "sampled"]
REGIMES: tuple[Regime, ...] = ("greedy", "sampled")
HELD_OUT = 4
"""Every fourth request judges the fit and takes no part in it."""


@dataclass(frozen=True)
class ReliabilityCurve:
    """Predicted survival against observed prefix acceptance, of one position in one regime."""

    regime: Regime
    position: int
    """From 1."""
    rows: tuple[ReliabilityRow, ...]


@dataclass(frozen=True)
class PositionReport:
    """What calibration did for one position in one regime, on rounds that the fit has not seen."""

    regime: Regime
    position: int
    """From 1."""
    temperature: float
    bias: float
    rounds: int
    """Rounds that verified this position, of those that judge."""
    error_before: float
    """Expected calibration error of the survival; nan without rounds."""
    error_after: float
    auc: float
    """How well the survival tells prefixes that stand from others; nan where all stood or none did."""
    conditional_auc: float
    """How well the position's own confidence does, among rounds where all drafts before it stood."""


@dataclass(frozen=True)
class CalibrationReport:
    """A fitted calibration and its judgement."""

    calibration: Calibration
    positions: tuple[PositionReport, ...]
    before: tuple[ReliabilityCurve, ...]
    after: tuple[ReliabilityCurve, ...]
    num_judged: int
    """Rounds that judged."""


def calibrate(rounds: RoundTable, drafter_hash: str) -> CalibrationReport:
    """Fit both regimes. What could not be fitted or judged properly is noted in the calibration.

    In each regime three of four requests fit and the fourth judges; with fewer than four, all do both. A regime without
    rounds keeps the identity.
    """
    notes: list[str] = []
    scalings: dict[Regime, Scaling] = {}
    judges = np.zeros(len(rounds), dtype=np.bool_)
    for regime in REGIMES:
        own = rounds.sampled == (regime == "sampled")
        if not own.any():
            notes.append(f"{regime}: no rounds, its temperatures stay 1")
            scalings[regime] = Scaling.identity(rounds.block_size)
            continue
        held_out = own & np.isin(rounds.request, np.unique(rounds.request[own])[HELD_OUT - 1 :: HELD_OUT])
        if held_out.any():
            judges |= held_out
        else:
            notes.append(
                f"{regime}: fewer than {HELD_OUT} requests, so its errors are those of the rounds it was fitted to"
            )
            judges |= own
        part = rounds.where(own & ~held_out)
        fitted = fit(part.confidence_logits, part.accepted, part.verified)
        scalings[regime] = fitted.scaling
        notes += [f"{regime}, {note}" for note in fitted.notes]
    calibration = Calibration(scalings["greedy"], scalings["sampled"], drafter_hash, tuple(notes))
    identity, judged = Calibration.identity(rounds.block_size), rounds.where(judges)
    return CalibrationReport(
        calibration=calibration,
        positions=_reports(judged, identity, calibration),
        before=reliability_curves(judged, identity),
        after=reliability_curves(judged, calibration),
        num_judged=len(judged),
    )


def reliability_curves(rounds: RoundTable, calibration: Calibration) -> tuple[ReliabilityCurve, ...]:
    """A curve for every regime and position that was verified at all."""
    survival = calibration.survival(rounds.confidence_logits, rounds.sampled)
    curves = []
    for regime in REGIMES:
        own = rounds.sampled == (regime == "sampled")
        for index in range(rounds.block_size):
            seen = own & (rounds.verified > index)
            if seen.any():
                rows = reliability(survival[seen, index], rounds.accepted[seen] > index, BINS)
                curves.append(ReliabilityCurve(regime, index + 1, tuple(rows)))
    return tuple(curves)


def calibration_table(positions: Sequence[PositionReport]) -> Table:
    """Calibration errors before and after, and AUC, by position and regime."""
    table = Table(title="Calibration: survival of a draft against observed acceptance")
    for heading in ("regime", "draft", "rounds", "T", "b", "ECE before", "ECE after", "AUC", "AUC if reached"):
        table.add_column(heading, justify="left" if heading == "regime" else "right")
    for index, row in enumerate(positions):
        table.add_row(
            row.regime if index == 0 or positions[index - 1].regime != row.regime else "",
            str(row.position),
            str(row.rounds),
            f"{row.temperature:.2f}",
            f"{row.bias:+.1f}",
            *(_number(value) for value in (row.error_before, row.error_after, row.auc, row.conditional_auc)),
            end_section=index + 1 < len(positions) and positions[index + 1].regime != row.regime,
        )
    return table


def _reports(rounds: RoundTable, before: Calibration, after: Calibration) -> tuple[PositionReport, ...]:
    """One for every regime that has rounds at all and every position."""
    plain = before.survival(rounds.confidence_logits, rounds.sampled)
    fitted = after.survival(rounds.confidence_logits, rounds.sampled)
    reports = []
    for regime in REGIMES:
        own = rounds.sampled == (regime == "sampled")
        if not own.any():
            continue
        scaling = after.sampled if regime == "sampled" else after.greedy
        for index in range(rounds.block_size):
            seen = own & (rounds.verified > index)
            stood = rounds.accepted > index
            reached = seen & (rounds.accepted >= index)
            reports.append(
                PositionReport(
                    regime=regime,
                    position=index + 1,
                    temperature=scaling.temperatures[index],
                    bias=scaling.biases[index],
                    rounds=int(seen.sum()),
                    error_before=expected_calibration_error(plain[seen, index], stood[seen], BINS),
                    error_after=expected_calibration_error(fitted[seen, index], stood[seen], BINS),
                    auc=auc(fitted[seen, index], stood[seen]),
                    conditional_auc=auc(rounds.confidence_logits[reached, index], stood[reached]),
                )
            )
    return tuple(reports)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
