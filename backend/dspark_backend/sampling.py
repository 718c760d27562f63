"""From the target's logits to the distribution a token is drawn from, and the draw.

The order is vLLM's: bad words and ``min_tokens`` (to -inf), repetition, presence and frequency penalties, temperature,
min-p, top-k, top-p. Tokens are ranked by penalised logit, highest first, equal ones by lower token id; each of min-p,
top-k and top-p keeps the head of that ranking, so the result never depends on how a sort treats ties. min-p alone keeps
equal logits together.

V is the vocabulary size. Logits are those of one position of one sequence, float32 [V], and are never written to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dspark_backend.bad_words import BadWords, TokenIds, TokenMask
from dspark_backend.errors import DSparkError, InvalidRequest, NotFinite
from dspark_backend.penalties import SamplingContext, penalise
from dspark_backend.request import SamplingParams
from dspark_backend.rng import Purpose, RngStreams

__all__ = [
    "BadWords",
    "Purpose",
    "RngStreams",
    "SamplingContext",
    "TokenMask",
    "check_peak",
    "draw",
    "greedy_token",
    "log_probability",
    "masked_logits",
    "needs_logits",
    "target_distribution",
    "top_k_ids",
]

Logits: TypeAlias = NDArray[np.float32]
Probabilities: TypeAlias = NDArray[np.float64]

NO_MASK = TokenMask()

_GROUP = 16
"""Tokens to a group in ``top_k_ids``."""
_SORT_AT_ONCE = 2048
"""Up to so many candidates are sorted for top-p; more go through buckets first."""
_BUCKETS = 2048
_LEAST_SPAN = 1e-9
"""Of scores, in nats: keeps the bucket width above zero where all logits are equal."""
_FLOOR_MARGIN = 0.01
"""Far above rounding errors, and too little to keep many more tokens."""


def needs_logits(params: SamplingParams, mask: TokenMask = NO_MASK, output_length: int = 0) -> bool:
    """Whether the next tokens depend on more than the argmax of the raw logits.

    False means that the graph's argmax is the answer at ``output_length`` and every later position.
    """
    return not params.greedy or params.penalises or mask.may_ban(output_length)


def masked_logits(
    logits: Logits,
    params: SamplingParams,
    context: SamplingContext,
    mask: TokenMask = NO_MASK,
    peak: float | None = None,
) -> tuple[Logits, float]:
    """Logits [V] after masks and penalties (``logits`` itself where neither applies), and their maximum.

    ``peak`` is the maximum of ``logits``, NaN where any of them is, for callers that know it.

    Raises:
        DSparkError: the logits hold NaN or +inf, or nothing but -inf.
        InvalidRequest: bad words and min_tokens leave no token.
    """
    peak = check_peak(_maximum(logits) if peak is None else peak)
    banned = mask.banned(context.output_ids)
    if not (banned.size or params.penalises):
        return logits, peak
    changed = logits.copy()
    changed[banned] = -np.inf
    if params.penalises:
        penalise(changed, params, context)
    peak = float(changed.max())
    if peak == -math.inf:
        raise InvalidRequest(
            f"bad_words and min_tokens: expected at least one of {logits.size} tokens to stay possible, but none does "
            f"at output position {context.output_length}; remove bad words or lower min_tokens"
        )
    if not math.isfinite(peak):
        raise DSparkError(f"penalties: expected finite logits, got a maximum of {peak}; use smaller penalties")
    return changed, peak


def greedy_token(
    logits: Logits,
    params: SamplingParams,
    context: SamplingContext,
    mask: TokenMask = NO_MASK,
    peak: float | None = None,
) -> int:
    """The token of the largest logit after masks and penalties, the lowest id of equal ones.

    ``peak`` and errors: as ``masked_logits``.
    """
    changed, _ = masked_logits(logits, params, context, mask, peak)
    return int(changed.argmax())


def target_distribution(
    logits: Logits,
    params: SamplingParams,
    context: SamplingContext,
    mask: TokenMask = NO_MASK,
    peak: float | None = None,
) -> Probabilities:
    """The distribution of the next token after ``context``: float64 [V], sums to 1, a new array.

    Temperature 0 gives 1 to ``greedy_token``. ``peak`` and errors: as ``masked_logits``.
    """
    changed, peak = masked_logits(logits, params, context, mask, peak)
    if params.greedy:
        certain = np.zeros(logits.size)
        certain[changed.argmax()] = 1.0
        return certain
    if 0 < params.top_k < changed.size:
        ids = top_k_ids(changed, params.top_k)
        scores = _scores(changed[ids], peak, params.temperature)
    else:
        ids = None
        scores = _scores(changed, peak, params.temperature)
    if params.min_p > 0.0:
        kept = np.flatnonzero(scores >= math.log(params.min_p))
        ids, scores = _subset(ids, kept), scores[kept]
    if params.top_p < 1.0:
        kept, weights = _nucleus(scores, params.top_p)
        ids = _subset(ids, kept)
    else:
        weights = np.exp(scores, out=scores)
    weights *= 1.0 / weights.sum()
    if ids is None:
        return weights
    probabilities = np.zeros(logits.size)
    probabilities[ids] = weights
    return probabilities


def draw(probabilities: NDArray[np.floating[Any]], uniform: float) -> int:
    """The token at ``uniform`` in [0, 1) of the cumulated distribution [V].

    The weights need not sum to 1 (a residual max(p - q, 0) can be drawn from as it is). A token of weight 0 is never
    returned, whatever the rounding.

    Raises:
        DSparkError: ``uniform`` is outside [0, 1), or the weights have no finite positive sum.
    """
    if not 0.0 <= uniform < 1.0:
        raise DSparkError(f"draw: expected a uniform number in [0, 1), got {uniform}")
    cumulated = np.cumsum(probabilities, dtype=np.float64)
    total = cumulated[-1]
    if not 0.0 < total < math.inf:
        raise DSparkError(f"draw: expected weights with a finite positive sum, got a sum of {total}")
    token = int(cumulated.searchsorted(uniform * total, side="right"))
    if token == cumulated.size:
        # uniform * total rounded up to total: the last token that added anything to the sum.
        token = int(cumulated.searchsorted(total, side="left"))
    return token


def log_probability(
    logits: Logits, tokens: int | Sequence[int] | NDArray[np.integer[Any]], peak: float | None = None
) -> NDArray[np.float64]:
    """Log-probabilities of tokens under the unmodified logits, float64, of the shape of ``tokens``.

    ``logits`` [V] takes one token or any number of them (and ``peak``, as ``masked_logits``); ``logits`` [n, V] takes n
    tokens, one a row.

    Raises:
        DSparkError: the logits hold NaN or +inf, or nothing but -inf.
    """
    index = np.asarray(tokens, dtype=np.intp)
    if logits.ndim == 1:
        peak = check_peak(_maximum(logits) if peak is None else peak)
        log_sum = math.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64))
        return np.subtract(logits[index], peak, dtype=np.float64) - log_sum
    if index.shape != logits.shape[:1]:
        raise ValueError(f"tokens: expected one for each of {len(logits)} rows, got shape {index.shape}")
    return np.array([log_probability(row, token) for row, token in zip(logits, index, strict=True)], dtype=np.float64)


def top_k_ids(logits: Logits, k: int) -> TokenIds:
    """The k highest-ranked tokens, exactly k (all where k >= V), in ascending order of id: int [k]. No full sort."""
    if k >= logits.size:
        return np.arange(logits.size)
    pool = values = None
    groups = logits.size // _GROUP
    if k <= groups // 4:
        # k groups have a maximum of at least `floor`, so k tokens do: nothing below it can be among the first k.
        maxima = logits[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        floor = np.partition(maxima, groups - k)[groups - k]
        pool = np.flatnonzero(logits >= floor)
        values = logits[pool]
    else:
        values = logits
    lowest = np.partition(values, values.size - k)[values.size - k]
    keep = values > lowest
    missing = k - np.count_nonzero(keep)
    keep[np.flatnonzero(values == lowest)[:missing]] = True
    return _subset(pool, np.flatnonzero(keep))


def check_peak(peak: float) -> float:
    """The maximum of a row of logits, which must be finite: NaN and +inf anywhere in the row show in it.

    -inf is a legal logit as long as it is not the only one.

    Raises:
        DSparkError: it is not finite.
    """
    if not math.isfinite(peak):
        found = "nothing but -inf" if peak == -math.inf else str(peak)
        raise NotFinite(
            f"logits: expected finite numbers from the target, got {found}; "
            "the model or its precision is broken: check the exported artifact"
        )
    return peak


def _maximum(logits: Logits) -> float:
    """NaN where any of [V] is."""
    return float(logits.max())


def _scores(logits: Logits, peak: float, temperature: float) -> Probabilities:
    """(logits - peak) / temperature: float64, at most 0. Subtracting first keeps small temperatures exact."""
    scores: Probabilities = np.subtract(logits, peak, dtype=np.float64)
    if temperature != 1.0:
        with np.errstate(over="ignore"):
            scores /= temperature
    return scores


def _subset(ids: TokenIds | None, kept: TokenIds) -> TokenIds:
    return kept if ids is None else ids[kept]


def _nucleus(scores: Probabilities, top_p: float) -> tuple[TokenIds, Probabilities]:
    """Indices (in any order) and unnormalised weights of the smallest head of the ranking that holds ``top_p``.

    Tokens below ``floor`` hold at most 1 - top_p even if all of them were at it, so the head never reaches them. Where
    many are above it, they are first counted into buckets of score, so that only the bucket in which the sum crosses
    ``top_p`` is sorted. Cutting scores into buckets is monotone, so every bucket outranks the next.
    """
    weights = np.exp(scores)
    total = float(weights.sum())
    needed = top_p * total
    floor = math.log((1.0 - top_p) * total / scores.size) - _FLOOR_MARGIN
    above = scores >= floor
    if np.count_nonzero(above) <= _SORT_AT_ONCE:
        pool = np.flatnonzero(above)
        kept = pool[_head(scores[pool], weights[pool], needed)]
    else:
        span = min(-floor, max(-float(scores.min()), _LEAST_SPAN))
        levels = scores * (-(_BUCKETS - 1) / span)
        buckets = np.minimum(levels, _BUCKETS - 1, out=levels).astype(np.intp)
        cumulated = np.cumsum(np.bincount(buckets, weights, minlength=_BUCKETS))
        crossing = int(cumulated.searchsorted(needed, side="left"))
        before = float(cumulated[crossing - 1]) if crossing else 0.0
        members = np.flatnonzero(buckets == crossing)
        keep = buckets < crossing
        keep[members[_head(scores[members], weights[members], needed - before)]] = True
        kept = np.flatnonzero(keep)
    return kept, weights[kept]


def _head(scores: Probabilities, weights: Probabilities, needed: float) -> TokenIds:
    """Indices, best first, of the smallest head of the ranking whose weights sum to ``needed``; at least one."""
    order = np.argsort(-scores, kind="stable")
    count = int(np.cumsum(weights[order]).searchsorted(needed, side="left")) + 1
    return order[:count]
