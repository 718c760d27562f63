"""What goes into a verification step and what comes out: plain arrays, no runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one request: a prefill chunk, or the anchor followed by its drafts."""

    slot: int
    start: int
    """Position of the first token in its sequence."""
    token_ids: Sequence[int]
    logits_from: int
    """Index within ``token_ids`` of the first token whose logits are wanted; its length wants none."""


@dataclass(frozen=True)
class StepBatch:
    """A ragged batch: B tokens of R segments, flat, segment by segment. All int64."""

    token_ids: IntArray
    """[B]"""
    positions: IntArray
    """[B]"""
    segment_of: IntArray
    """[B]: which segment a token belongs to."""
    columns: IntArray
    """[B]: index of a token within its segment."""
    slots: IntArray
    """[R]: one slot a segment, all different."""
    offsets: IntArray
    """[R + 1]: first token of each segment."""
    logit_rows: IntArray
    """[N]: tokens whose logits are wanted, in order."""
    logit_offsets: IntArray
    """[R + 1]: first wanted row of each segment."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def pack(cls, segments: Sequence[Segment]) -> StepBatch:
        """Lay the segments out one after another."""
        lengths = np.array([len(segment.token_ids) for segment in segments], dtype=np.int64)
        starts = np.array([segment.start for segment in segments], dtype=np.int64)
        first_logit = np.array([segment.logits_from for segment in segments], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        segment_of = np.repeat(np.arange(len(segments)), lengths)
        columns = np.arange(offsets[-1]) - offsets[segment_of]
        return cls(
            token_ids=np.concatenate([np.asarray(segment.token_ids, dtype=np.int64) for segment in segments]),
            positions=starts[segment_of] + columns,
            segment_of=segment_of,
            columns=columns,
            slots=np.array([segment.slot for segment in segments], dtype=np.int64),
            offsets=offsets,
            logit_rows=np.flatnonzero(columns >= first_logit[segment_of]),
            logit_offsets=np.concatenate([[0], np.cumsum(lengths - first_logit)]).astype(np.int64),
        )


@dataclass(frozen=True)
class StepOutput:
    """Results of a step. The arrays are views of buffers that the next step overwrites."""

    logits: FloatArray
    """[N, V], float32, as the model gives them."""
    argmax: IntArray
    """[N]: the first index of the largest logit of each row."""
    features: FloatArray
    """[B, taps * H]: residual stream after each tapped layer, concatenated in tap order."""


@dataclass(frozen=True)
class RowMove:
    """Cached rows 0 .. length-1 of ``source`` go to ``target``."""

    source: int
    target: int
    length: int
