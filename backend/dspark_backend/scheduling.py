"""Verification depth policies: how many drafts of each request go into the next step.

DESIGN, "Scheduling"; the DSpark paper's Algorithm 1 is :class:`Causal`. A policy must stay lossless: whether draft j of
a request is verified may depend on the tokens before it, never on itself or on those behind it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class DraftRound:
    """What a policy may look at: R requests with a block of g drafts each."""

    survival: FloatArray
    """[R, g]: calibrated probability that drafts 1 .. k all stand; does not grow along a row."""
    lagged_survival: FloatArray
    """[R, g]: the same of two rounds ago (an average where a request has none): independent of this round's drafts."""
    limits: IntArray
    """[R]: most drafts worth verifying for each request: its own cap, the tokens it may still emit."""
    seconds: FloatArray
    """[g * R + 1]: predicted time of the whole round when k drafts are verified in all, the drafter's time included."""
    base_tokens: float
    """Tokens this step yields however deep we verify: one a request of the batch, also those of other policies."""

    @property
    def num_requests(self) -> int:
        return len(self.limits)


ANY_DEPTH = sys.maxsize


class DepthPolicy(Protocol):
    """Chooses depths, one a request, between 0 and its limit."""

    @property
    def drafts(self) -> bool:
        """False: the drafter never runs for requests of this policy."""

    @property
    def adaptive(self) -> bool:
        """True: depths weigh requests against each other, and the drafter rests where it does not pay."""

    @property
    def deepest(self) -> int:
        """Most drafts of a request that are ever verified; ``ANY_DEPTH`` where the confidences decide."""

    def depths(self, draft_round: DraftRound) -> IntArray:
        """Drafts to verify for each request, int64 [R]."""


@dataclass(frozen=True)
class Off:
    """No speculation."""

    drafts = False
    adaptive = False
    deepest = 0

    def depths(self, draft_round: DraftRound) -> IntArray:
        return np.zeros(draft_round.num_requests, dtype=np.int64)


@dataclass(frozen=True)
class Fixed:
    """The same depth for everybody: the usual baseline; depth 1 resembles a single MTP head."""

    depth: int
    drafts = True
    adaptive = False

    @property
    def deepest(self) -> int:
        return self.depth

    def depths(self, draft_round: DraftRound) -> IntArray:
        return np.minimum(draft_round.limits, min(self.depth, draft_round.survival.shape[1]))


@dataclass(frozen=True)
class Threshold:
    """The reference's static rule: verify while the survival probability is at least ``level``."""

    level: float
    drafts = True
    adaptive = False
    deepest = ANY_DEPTH

    def depths(self, draft_round: DraftRound) -> IntArray:
        deep = np.cumprod(draft_round.survival >= self.level, axis=1).sum(axis=1)
        return np.minimum(draft_round.limits, deep.astype(np.int64))


@dataclass(frozen=True)
class Causal:
    """Algorithm 1: admit drafts by descending survival while throughput grows, and stop at the first that lowers it.

    Stopping at once is what keeps it lossless: a search beyond would look at confidences that depend on drafts whose
    admission is being decided.
    """

    drafts = True
    adaptive = True
    deepest = ANY_DEPTH

    def depths(self, draft_round: DraftRound) -> IntArray:
        if draft_round.limits.sum() <= _FEW:
            return _one_by_one(draft_round)
        drafts = _by_place(draft_round.survival, draft_round.limits)
        ranked = _ranked(drafts)
        throughput = _throughput(ranked, draft_round)
        falls = np.flatnonzero(throughput[1:] <= throughput[:-1])
        return _best(drafts, ranked, int(falls[0]) if falls.size else len(ranked))


@dataclass(frozen=True)
class Lagged:
    """The budget is the best one for the confidences of two rounds ago, cliffs in the cost curve and all; the live
    confidences rank who gets it. Lossless because the budget does not see this round's drafts.
    """

    drafts = True
    adaptive = True
    deepest = ANY_DEPTH

    def depths(self, draft_round: DraftRound) -> IntArray:
        past = _ranked(_by_place(draft_round.lagged_survival, draft_round.limits))
        budget = int(np.argmax(_throughput(past, draft_round)))
        drafts = _by_place(draft_round.survival, draft_round.limits)
        return _best(drafts, _ranked(drafts), budget)


_FEW = 100
"""Drafts up to which plain Python is faster than arrays: each call of numpy costs microseconds, cold ones most."""


def _one_by_one(draft_round: DraftRound) -> IntArray:
    """Algorithm 1 as it is written. Equal drafts go by place in the block, then by request."""
    limits = draft_round.limits.tolist()
    drafts = sorted(
        (-chance, place, row)
        for row, curve in enumerate(draft_round.survival.tolist())
        for place, chance in enumerate(curve[: limits[row]])
        if chance >= 0.0  # not for NaN: what cannot be ranked is never verified
    )
    seconds = draft_round.seconds[: len(drafts) + 1].tolist()
    depths, tokens = [0] * len(limits), 0.0
    best = draft_round.base_tokens / seconds[0]
    for count, (negative, _, row) in enumerate(drafts, start=1):
        tokens -= negative
        throughput = (tokens + draft_round.base_tokens) / seconds[count]
        if throughput <= best:
            break
        best = throughput
        depths[row] += 1
    return np.array(depths, dtype=np.int64)


def _by_place(survival: FloatArray, limits: IntArray) -> FloatArray:
    """[g, R]: survival [R, g] by place in the block, then by request; -1 beyond the limits."""
    places = np.arange(survival.shape[1])[:, None]
    return np.where(places < limits, survival.T, -1.0)


def _ranked(drafts: FloatArray) -> FloatArray:
    """Survival of all drafts within the limits, descending: [n]. Values alone: sorting those is several times faster
    than ranking places, and equal ones are worth the same.
    """
    # NaN compares false: what cannot be ranked is never verified.
    return -np.sort(-drafts[drafts >= 0.0])


def _throughput(ranked: FloatArray, draft_round: DraftRound) -> FloatArray:
    """Expected tokens a second when the first k of ``ranked`` [n] are verified: [n + 1]."""
    tokens = np.empty(len(ranked) + 1)
    tokens[0] = 0.0
    np.cumsum(ranked, out=tokens[1:])
    tokens += draft_round.base_tokens
    return tokens / draft_round.seconds[: len(tokens)]


def _best(drafts: FloatArray, ranked: FloatArray, budget: int) -> IntArray:
    """Depths [R] that hold the ``budget`` first of ``ranked``, which are the values of ``drafts`` [g, R].

    Equal ones go by place in the block, then by request: no tie is broken by what a token is, and a request's drafts
    come in order.
    """
    count = drafts.shape[1]
    budget = min(budget, len(ranked))
    if budget == 0:
        return np.zeros(count, dtype=np.int64)
    least = ranked[budget - 1]
    better = drafts > least
    depths = better.sum(axis=0, dtype=np.int64)
    equal = np.flatnonzero(drafts.ravel() == least)[: budget - int(depths.sum())]
    return np.asarray(depths + np.bincount(equal % count, minlength=count))


POLICY_FORMS = "off, fixed:N, threshold:P, causal or lagged"


def parse_policy(text: str) -> DepthPolicy:
    """The policy that a setting names.

    Raises:
        ValueError: another name, or a missing or wrong number; the message says what was expected.
    """
    plain: dict[str, DepthPolicy] = {"off": Off(), "causal": Causal(), "lagged": Lagged()}
    if text in plain:
        return plain[text]
    name, _, argument = text.partition(":")
    try:
        if name == "fixed" and int(argument) >= 0:
            return Fixed(int(argument))
        if name == "threshold" and 0.0 <= float(argument) <= 1.0:
            return Threshold(float(argument))
    except ValueError:
        pass
    raise ValueError(f"expected {POLICY_FORMS} (N at least 0, P from 0 to 1), got {text!r}")
