"""What goes into a drafting round and what comes out: plain arrays, no runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspark_backend.request import LEAST_TEMPERATURE, SamplingParams
from dspark_backend.stages.batch import FloatArray, IntArray
from dspark_backend.stages.rows import Rows


@dataclass(frozen=True)
class ContextRows:
    """M newly committed positions whose target features become drafter context."""

    features: Rows
    """[M, F]"""
    positions: IntArray
    """[M]"""
    slots: IntArray
    """[M]"""

    @property
    def num_rows(self) -> int:
        return len(self.positions)

    @classmethod
    def none(cls, feature_size: int) -> ContextRows:
        """No rows: all that is committed is in the cache already."""
        nowhere = np.empty(0, dtype=np.int64)
        return cls(np.empty((0, feature_size), dtype=np.float32), nowhere, nowhere)


@dataclass(frozen=True)
class DraftSampling:
    """How the tokens of R blocks are drawn; the fields are those of :class:`DraftBatch`."""

    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    min_p: FloatArray

    @classmethod
    def of(cls, params: Sequence[SamplingParams], num_candidates: int) -> DraftSampling:
        """As requests want their tokens drawn, from at most ``num_candidates``."""
        top_k = [1 if one.greedy else one.top_k if one.top_k > 0 else num_candidates for one in params]
        return cls(
            temperature=np.array(
                [1.0 if one.greedy else max(one.temperature, LEAST_TEMPERATURE) for one in params], dtype=np.float32
            ),
            top_k=np.minimum(np.array(top_k, dtype=np.int64), num_candidates),
            top_p=np.array([one.top_p for one in params], dtype=np.float32),
            min_p=np.array([one.min_p for one in params], dtype=np.float32),
        )


@dataclass(frozen=True)
class DraftBatch:
    """A block of m tokens, at most the block size, for each of R requests.

    A block that ends early is not the beginning of a longer one: its tokens look at each other. Its confidences and
    probabilities are its own, so that nothing that is lossless with whole blocks stops being so.
    """

    context: ContextRows
    """Rows that are not in the cache yet; after them every position below a request's start is."""
    anchors: IntArray
    """[R]: the last token the target produced."""
    slots: IntArray
    """[R]"""
    starts: IntArray
    """[R]: the anchor's position."""
    uniforms: FloatArray
    """[R, m] in [0, 1): one number a draw, from the request's own DRAFT stream."""
    temperature: FloatArray
    """[R], above 0."""
    top_k: IntArray
    """[R], at least 1; 1 is greedy."""
    top_p: FloatArray
    """[R]"""
    min_p: FloatArray
    """[R]"""

    def without_context(self) -> DraftBatch:
        """The same where the context is in the cache already."""
        none = slice(0, 0)
        context = self.context
        return replace(self, context=ContextRows(context.features[none], context.positions[none], context.slots[none]))


@dataclass(frozen=True)
class DraftOutput:
    """What the drafter proposes. The arrays are the caller's."""

    tokens: IntArray
    """[R, m]"""
    candidates: IntArray
    """[R, m, K]: tokens that could have been drawn."""
    probabilities: FloatArray
    """[R, m, K]: q of each candidate: the distribution the token was really drawn from."""
    confidence_logits: FloatArray
    """[R, m]"""

    def proposal(self, row: int, slot: int) -> tuple[IntArray, FloatArray]:
        """(tokens, probabilities) of the support of q at one place."""
        support = np.flatnonzero(self.probabilities[row, slot])
        return self.candidates[row, slot, support], self.probabilities[row, slot, support]
