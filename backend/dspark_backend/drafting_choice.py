"""Which sequences draft in a round: those for which it is expected to pay, and now and then others, to look again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from dspark_backend.draft_state import Survival
from dspark_backend.round_cost import RoundCost
from dspark_backend.scheduling import FloatArray, IntArray
from dspark_backend.sequence import SequenceState

_UNTRIED = 4
"""Sequences that have not drafted yet do so along with others, or when they are one in so many of the batch: a trial
makes the step longer for everybody, whoever and how many are tried."""
_HOPE = 0.5
"""Power of the mean survival that would have to pay for them to be tried: good texts are to be found, but not where
even they would not pay."""
_MARGIN = 1.04
"""What drafting must be expected to bring at least: the cost model knows neither the host's work for drafts nor the
rows that a prompt adds to the drafter's cache."""
_PROBE_EVERY = 48
"""Rounds after which a sequence drafts again although it did not seem to pay: acceptance changes along a text."""
_PROBE_ALONG = 24
"""Rounds after which it does so along with one that is due: one drafting round of many costs less than many of one."""
_DECIDE_EVERY = 4
"""Rounds for which it is not asked again who should draft."""
_LOOK_EVERY = 12
"""Rounds after which a slot more is drafted than may be verified: without ever looking there, nothing would tell when
going deeper pays."""
_CLOSE = 1.35
"""Where drafting is expected to bring less, a round without it now and then is worth what it tells of its price."""
_NEARLY = 0.99
"""Part of the most tokens a second for which the shallowest blocks that reach it are drafted. Less comes of deep ones
than is expected: those that look best are partly luck, and the scheduler stops where a search over all would go on.
Measured on the model's clock, taking the deepest cost 1% of all tokens a second at 8 requests and 3% at 16 and 64."""
_DEPTHS = (1, 2, 3, 5)
"""Depths that are tried beside whole blocks."""


@dataclass(frozen=True)
class Chosen:
    """Who drafts, and how deep the adaptive policies may go."""

    rows: list[int]
    """Ascending."""
    depth: int
    """Most drafts to verify of a request with an adaptive policy: where the widest request makes a step longer for all,
    or the drafter for every slot, a few deep drafts are not worth it."""
    width: int = 0
    """Slots to draft for requests with an adaptive policy: ``depth`` or more, where anybody drafts."""
    gain: float = field(default=math.inf, compare=False)
    """Tokens a second that are expected, over those of a round without drafts; infinite before anything is known."""


class DraftingChoice:
    """Chooses by what earlier rounds taught alone, so that no choice can depend on a token that it decides about."""

    def __init__(self, cost: RoundCost, block_size: int) -> None:
        self._cost = cost
        self._block_size = block_size
        self._decided: _Decision | None = None
        self._rounds = 0

    def choose(
        self, running: Sequence[SequenceState], limits: IntArray, capacity: int, prior: Survival | None
    ) -> Chosen:
        """Of ``running``, those with a static policy draft always, those with an adaptive one where it pays.

        Args:
            limits: [R], most drafts worth verifying for each.
            prior: running mean of everybody's survival curves; None before anybody has drafted.
        """
        able: list[int] = np.flatnonzero(limits > 0).tolist()
        adaptive = [row for row in able if running[row].prepared.policy.adaptive]
        if not adaptive:
            return Chosen(able, self._block_size, self._block_size)
        static = [int(limits[row]) for row in able if not running[row].prepared.policy.adaptive]
        gainful = self._gainful(running, adaptive, limits, capacity, prior, max(static, default=0))
        if gainful.rows and not static and gainful.gain < _CLOSE and self._cost.wants_plain(len(running)):
            return Chosen([], 0)
        rows, depth, width = set(gainful.rows), gainful.depth, gainful.width
        probing = self._probing(running, [row for row in adaptive if row not in rows], bool(rows), capacity, prior)
        if probing:
            rows |= probing
            # Their confidences are what is wanted.
            depth = max(depth, 1 if self._cost.depth_costs(len(running), capacity) else self._block_size)
            width = max(width, self._deeper(depth))
        rows |= {row for row in able if not running[row].prepared.policy.adaptive}
        return Chosen(sorted(rows), depth, width)

    def _probing(
        self, running: Sequence[SequenceState], resting: list[int], others: bool, capacity: int, prior: Survival | None
    ) -> set[int]:
        """Which of those that are not expected to gain draft nevertheless, to find out. ``others``: some do anyway."""
        idle = {row: running[row].draft.idle_rounds for row in resting}
        due = any(rounds >= _PROBE_EVERY for rounds in idle.values())
        found = {row for row, rounds in idle.items() if due and rounds >= _PROBE_ALONG}
        untried = {row for row in resting if running[row].draft.expected is None}
        if others or found:
            return found | untried
        if untried and prior is not None and _UNTRIED * len(untried) >= len(running):
            # As if all were as good as may be hoped: one alone could not bring enough for many.
            hoped = np.tile(prior**_HOPE, (1, len(running), 1))
            room = np.full(len(running), self._block_size, dtype=np.int64)
            if most_gainful(hoped, room, len(running), capacity, self._cost).rows:
                return untried
        return found

    def _deeper(self, depth: int) -> int:
        return min(depth + 1, self._block_size)

    def _gainful(
        self,
        running: Sequence[SequenceState],
        adaptive: list[int],
        limits: IntArray,
        capacity: int,
        prior: Survival | None,
        floor: int,
    ) -> Chosen:
        """The averages that decide move slowly: an answer holds for a few rounds of the same sequences."""
        key = (len(running), capacity, *(running[row].number for row in adaptive))
        if self._decided is None or self._decided.spent or self._decided.key != key:
            if prior is None:
                return Chosen(adaptive, self._block_size, self._block_size)  # nothing is known yet: find out
            rounds = np.array([running[row].draft.rounds(prior) for row in adaptive]).swapaxes(0, 1)
            found = most_gainful(rounds, limits[adaptive], len(running), capacity, self._cost, floor)
            self._decided = _Decision(key, found)
        chosen = self._decided.chosen
        self._decided.rounds += 1
        self._rounds += 1
        look = self._rounds % _LOOK_EVERY == 0
        # Rows of the batch are others when a sequence of another policy has come or gone: places among these are not.
        rows = [adaptive[place] for place in chosen.rows]
        return Chosen(rows, chosen.depth, self._deeper(chosen.depth) if look else chosen.depth, chosen.gain)


def most_gainful(
    rounds: FloatArray, limits: IntArray, count: int, capacity: int, cost: RoundCost, floor: int = 0
) -> Chosen:
    """Which of n sequences should draft, and how deep, for the most tokens a second; none where drafting lowers them.

    Rounds differ: in one that turns out sure a wide block is worth much, another is cut short. So tokens over seconds
    of several ``rounds`` together are compared, each verified as deep as is best for it: the mean of their curves would
    be worth less than they are.

    Those with the longest expected prefix go first; up to how many is tried in quarters of all, how deep in steps that
    grow, and the shallowest of what is nearly best is taken: none where drafting brings less than ``_MARGIN``.

    Args:
        rounds: [m, n, g], survival curves of m rounds that are taken to be as likely as one another.
        limits: [n], most drafts worth verifying for each.
        count: requests of the batch, n or more.
        floor: how deep others of the batch go anyway.
    """
    block = rounds.shape[-1]
    # What was learned in earlier rounds cannot leak a token of this one: a free search is allowed here.
    within = np.where(np.arange(block) < limits[:, None], rounds, 0.0)
    plain = count / float(cost.step_seconds(count, 0, capacity, floor)[0])
    depths = {*(depth for depth in _DEPTHS if depth < block), block} if cost.depth_costs(count, capacity) else {block}

    def seconds(drafting: int, drafts: int, depth: int) -> FloatArray:
        verifying = cost.step_seconds(count, drafts, capacity, max(depth, floor))
        return verifying + cost.draft_seconds(drafting, capacity, depth)

    found = [_of_depth(depth, within[..., :depth], limits, count, plain, seconds) for depth in depths]
    enough = max(_MARGIN, _NEARLY * max(chosen.gain for chosen in found))
    return min((chosen for chosen in found if chosen.gain >= enough), key=attrgetter("depth"), default=Chosen([], 0))


def _of_depth(
    depth: int,
    rounds: FloatArray,
    limits: IntArray,
    count: int,
    plain: float,
    seconds: Callable[[int, int, int], FloatArray],
) -> Chosen:
    """The best rows of ``rounds`` [m, n, depth] to draft so deep. ``plain``: tokens a second of a round without drafts.

    ``seconds``: of a round by drafts verified, [k + 1], from how many draft, k, and how deep.
    """
    number, size, _ = rounds.shape
    order = np.argsort(-rounds.mean(axis=0).sum(axis=1), kind="stable")
    best = Chosen([], depth, depth, 0.0)
    for tried in range(1, size + 1) if size <= 4 else sorted({-(-size * part // 4) for part in range(1, 5)}):
        rows = order[:tried]
        most = int(np.minimum(limits[rows], depth).sum())
        tokens = np.full((number, most + 1), float(count))
        tokens[:, 1:] -= np.cumsum(np.sort(-rounds[:, rows].reshape(number, -1), axis=1)[:, :most], axis=1)
        took = seconds(tried, most, depth)
        verified = np.argmax(tokens / took, axis=1)
        gain = float(tokens[np.arange(number), verified].sum() / took[verified].sum()) / plain
        if gain > best.gain:
            best = Chosen(sorted(rows.tolist()), depth, depth, gain)
    return best


@dataclass
class _Decision:
    """Which of some sequences should draft."""

    key: tuple[int, ...]
    """Requests of the batch, capacity, and the numbers of the sequences."""
    chosen: Chosen
    """Rows are places among the sequences."""
    rounds: int = 0
    """How long it was relied on."""

    @property
    def spent(self) -> bool:
        return self.rounds >= _DECIDE_EVERY
