"""The target's distribution by the head of its ranking: what a draw needs where a row of logits is not in this memory.

A device ranks the K most probable of V tokens and sums up the whole row. Where top-k, min-p and top-p keep tokens of
that head alone, it is the whole distribution; without any of them the sum tells what is beyond it.

**One mapping, two ways to evaluate it.** To be lossless, which number draws which token must not depend on who works it
out: a draw among the head's tokens, and another one over the row for numbers that are beyond it, would draw common
tokens too often. So a head gives the answer that the row would give, or None, and then the row gives it (``place``).
Numbers walk through a distribution in the order of ids where the head is all of it, as
:func:`dspark_backend.sampling.draw` does, and otherwise through the head by rank and then through the others. What a
head does not know exactly (the sum, in float32; what tokens beyond it have) it takes at its least and at its most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dspark_backend.acceptance import Proposal
from dspark_backend.bad_words import TokenIds
from dspark_backend.request import LEAST_TEMPERATURE, GenerationRequest, SamplingParams
from dspark_backend.sampling import Probabilities, draw
from dspark_backend.stages.batch import RankedRows

_SUM_ERROR = 1e-5
"""Relative, of a sum over the vocabulary in float32; far more than a sum by pieces has."""
_ROUNDING = 1e-12
"""The same of a sum over the head in float64: the row adds up in another order."""


def ranking_temperature(request: GenerationRequest) -> float:
    """At which temperature a stage should rank the logits that this request draws from; 0 where it reads rows anyway.

    Greedy requests draw nothing, penalties change the logits, and log-probabilities are of another temperature.
    """
    params = request.sampling
    reads = params.penalises or request.log_probs or params.temperature < LEAST_TEMPERATURE
    return 0.0 if reads else params.temperature


@dataclass(frozen=True)
class Head:
    """A distribution over V tokens, of which k are known."""

    tokens: TokenIds
    """[k]: by id where they are all that can be drawn, else by rank."""
    weights: Probabilities
    """[k], float64: of each; its probability is this / the total."""
    totals: tuple[float, float]
    """Bounds of the sum of all V weights."""
    complete: bool
    """Whether all other tokens have weight 0; the bounds are then equal."""

    def accepts(self, proposal: Proposal, token: int, uniform: float) -> bool | None:
        """:func:`dspark_backend.acceptance.accepts`; None where that takes the row."""
        found = self.weights[self.tokens == token]
        if found.size:
            low = high = float(found[0])
        else:
            low, high = 0.0, 0.0 if self.complete else float(self.weights[-1])
        needed, (least, most) = uniform * proposal.of(token), self.totals
        surely, maybe = needed < low / most, needed < high / least
        return maybe if surely == maybe else None

    def draw(self, uniform: float, proposal: Proposal | None = None) -> int | None:
        """The token at ``uniform``; with a ``proposal`` that of max(p - q, 0). None where that takes the row."""
        least, most = self.totals
        if self.complete:
            weights, _ = self._residual(least, proposal)
            # As acceptance.residual: rounding may leave nothing of the difference where p and q are all but equal.
            return int(self.tokens[draw(weights if weights.sum() > 0.0 else self.weights, uniform)])
        larger, taken_most = self._residual(least, proposal)
        smaller, taken_least = self._residual(most, proposal)
        taken_most += self._taken_beyond(least, proposal)
        # All p sum to 1, so that max(p - q, 0) sums to 1 - sum(min(p, q)).
        first = int(np.cumsum(larger).searchsorted(uniform * (1.0 - taken_most), side="right"))
        last = int(np.cumsum(smaller).searchsorted(uniform * (1.0 - taken_least), side="right"))
        return int(self.tokens[first]) if first == last < len(self.tokens) else None

    def place(self, weights: Probabilities, uniform: float) -> int:
        """The token at ``uniform`` of weights of all V tokens, walked through in the order that ``draw`` has."""
        if self.complete:
            return draw(weights, uniform)
        others = np.ones(weights.size, dtype=np.bool_)
        others[self.tokens] = False
        order = np.concatenate([self.tokens, np.flatnonzero(others)])
        return int(order[draw(weights[order], uniform)])

    def _residual(self, total: float, proposal: Proposal | None) -> tuple[Probabilities, float]:
        """max(p - q, 0) of the known tokens, and the sum of their min(p, q)."""
        probabilities = self.weights / total
        if proposal is None:
            return probabilities, 0.0
        known, inside = self._find(proposal)
        q = np.zeros(len(probabilities))
        q[known[inside]] = proposal.probabilities[inside]
        # Where a broken proposal is NaN, these are, too: then nothing is drawn from them.
        return np.maximum(probabilities - q, 0.0), float(np.minimum(probabilities, q).sum())

    def _taken_beyond(self, total: float, proposal: Proposal | None) -> float:
        """The most that min(p, q) of other tokens can sum to."""
        if proposal is None:
            return 0.0
        _, inside = self._find(proposal)
        return float(np.minimum(proposal.probabilities[~inside], self.weights[-1] / total).sum(dtype=np.float64))

    def _find(self, proposal: Proposal) -> tuple[TokenIds, TokenIds]:
        """For each candidate a place among ``tokens``, and whether it is there."""
        by_id = np.argsort(self.tokens)
        places = np.searchsorted(self.tokens, proposal.candidates, sorter=by_id).clip(max=len(by_id) - 1)
        known = by_id[places]
        return known, self.tokens[known] == proposal.candidates


def head_of(ranked: RankedRows, row: int, params: SamplingParams) -> Head | None:
    """What a ranked row says of the distribution of :func:`dspark_backend.sampling.target_distribution` without masks
    and penalties. Its sum must be of the temperature of ``params``, and the row's largest logit finite.

    None where the ranking ends too early to say what is kept.
    """
    # A device ranks equal logits in any order.
    order = np.lexsort((ranked.ids[row], -ranked.logits[row]))
    logits, ids = ranked.logits[row][order], ranked.ids[row][order]
    scores = np.subtract(logits, logits[0], dtype=np.float64)
    with np.errstate(over="ignore"):
        scores /= params.temperature
    count, whole = len(ids), len(ids) == ranked.vocab_size
    complete = whole

    if 0 < params.top_k < ranked.vocab_size:
        # Where those kept and the last one here are equal, others may be, of lower ids.
        if params.top_k > count or not (whole or logits[params.top_k - 1] > logits[-1]):
            return None
        count, complete = params.top_k, True
    if params.min_p > 0.0:
        kept = int(np.count_nonzero(scores[:count] >= math.log(params.min_p)))
        if kept == len(ids) and not whole:
            return None
        count, complete = kept, True
    weights = np.exp(scores[:count])
    total, error = (float(weights.sum()), _ROUNDING) if complete else (float(ranked.exp_sum[row]), _SUM_ERROR)
    if not math.isfinite(total):
        return None
    if params.top_p < 1.0:
        # By score: logits that differ may have the same one. Equal weights are interchangeable but for who is kept.
        ids = ids[np.lexsort((ids[:count], -scores[:count]))]
        found = _nucleus(weights, params.top_p * total, error)
        if found is None or not (complete or scores[found - 1] > scores[-1]):
            return None
        weights, complete = weights[:found], True
        total = float(weights.sum())
    if not complete:
        return Head(ids, weights, (total * (1.0 - error), total * (1.0 + error)), False)
    by_id = np.argsort(ids[: len(weights)])
    return Head(ids[by_id], weights[by_id], (total, total), True)


def _nucleus(weights: Probabilities, needed: float, error: float) -> int | None:
    """How many of the ranked weights sum to ``needed``; None where they do not, or it is too close to call."""
    cumulated = np.cumsum(weights)
    fewest, most = (int(cumulated.searchsorted(needed * (1.0 + change), side="left")) + 1 for change in (-error, error))
    return fewest if fewest == most <= len(weights) else None
