"""Which sequences draft in a round: those for which it is expected to pay, and now and then others, to look again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_backend.draft_state import Survival
from dspark_backend.round_cost import RoundCost
from dspark_backend.scheduling import DraftRound, best_throughput
from dspark_backend.sequence import SequenceState
from dspark_backend.stages.batch import IntArray

_HOPE = 0.5
"""Power of the mean survival by which a sequence that has not drafted yet is judged: good texts are to be found, but
not where even they would not pay."""
_PROBE_EVERY = 48
"""Rounds after which a sequence drafts again although it did not seem to pay: acceptance changes along a text."""
_PROBE_ALONG = 24
"""Rounds after which it does so along with one that is due: one drafting round of many costs less than many of one."""
_DECIDE_EVERY = 4
"""Rounds for which it is not asked again who should draft."""


class DraftingChoice:
    """Chooses by what earlier rounds taught alone, so that no choice can depend on a token that it decides about."""

    def __init__(self, cost: RoundCost) -> None:
        self._cost = cost
        self._decided: _Decision | None = None

    def rows(
        self, running: Sequence[SequenceState], limits: IntArray, capacity: int, prior: Survival | None
    ) -> list[int]:
        """Ascending rows of ``running`` that draft: the static policies always, the adaptive ones where it pays.

        Args:
            limits: [R], most drafts worth verifying for each.
            prior: running mean of everybody's survival curves; None before anybody has drafted.
        """
        able: list[int] = np.flatnonzero(limits > 0).tolist()
        adaptive = [row for row in able if running[row].prepared.policy.adaptive]
        if not adaptive:
            return able
        gainful = self._gainful(running, adaptive, limits, capacity, prior)
        idle = {row: running[row].draft.idle_rounds for row in adaptive if row not in gainful}
        if any(rounds >= _PROBE_EVERY for rounds in idle.values()):
            gainful = gainful | {row for row, rounds in idle.items() if rounds >= _PROBE_ALONG}
        return [row for row in able if row in gainful or not running[row].prepared.policy.adaptive]

    def _gainful(
        self,
        running: Sequence[SequenceState],
        adaptive: list[int],
        limits: IntArray,
        capacity: int,
        prior: Survival | None,
    ) -> set[int]:
        """The averages that decide move slowly: an answer holds for a few rounds of the same sequences."""
        numbers = [running[row].number for row in adaptive]
        if self._decided is None or self._decided.spent or self._decided.numbers != numbers:
            if prior is None:
                return set(adaptive)  # nothing is known yet: find out
            curves = [running[row].draft.expected for row in adaptive]
            expected = [prior**_HOPE if curve is None else curve for curve in curves]
            places = most_gainful(np.array(expected), limits[adaptive], len(running), capacity, self._cost)
            self._decided = _Decision(numbers, {adaptive[place] for place in places})
        self._decided.rounds += 1
        return self._decided.rows


def most_gainful(survival: Survival, limits: IntArray, count: int, capacity: int, cost: RoundCost) -> list[int]:
    """Rows of ``survival`` [n, g] for which drafting raises tokens a second the most; none where it lowers them.

    Those with the longest expected prefix go first; up to how many is tried in eighths of all.

    Args:
        limits: [n], most drafts worth verifying for each.
        count: requests of the batch, n or more.
    """
    gains = np.where(np.arange(survival.shape[1]) < limits[:, None], survival, 0.0).sum(axis=1)
    order = np.argsort(-gains, kind="stable")
    best, chosen = count / float(cost.round_seconds(count, 0, 0, capacity)[0]), 0
    size = len(order)
    for tried in sorted({-(-size * part // 8) for part in range(1, 9)}):
        rows = order[:tried]
        seconds = cost.round_seconds(count, tried, int(limits[rows].sum()), capacity)
        # What was learned in earlier rounds cannot leak a token of this one: the free search is allowed here.
        throughput = best_throughput(DraftRound(survival[rows], survival[rows], limits[rows], seconds, count))
        if throughput > best:
            best, chosen = throughput, tried
    return sorted(order[:chosen].tolist())


@dataclass
class _Decision:
    """Which of some sequences should draft."""

    numbers: list[int]
    rows: set[int]
    rounds: int = 0
    """How long it was relied on."""

    @property
    def spent(self) -> bool:
        return self.rounds >= _DECIDE_EVERY
