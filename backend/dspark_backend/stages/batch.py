"""What goes into a verification step and what comes out: plain arrays, no runtime."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.rows import FloatArray as FloatArray
from dspark_backend.stages.rows import Rows

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one request: a prefill chunk, or the anchor followed by its drafts."""

    slot: int
    start: int
    """Position of the first token in its sequence."""
    token_ids: Sequence[int]
    logits_from: int
    """Index within ``token_ids`` of the first token whose logits are wanted; its length wants none."""
    temperature: float = 0.0
    """Above 0 where tokens are drawn from the logits as they are, at this temperature: a stage may rank them then."""


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """How segments of given lengths lie one after another. Read-only int64 arrays: a layout is shared by its steps.

    While the same requests decode, few combinations of lengths come up, again and again.
    """

    segment_of: IntArray
    """[B]: which segment a token belongs to."""
    columns: IntArray
    """[B]: index of a token within its segment."""
    offsets: IntArray
    """[R + 1]: first token of each segment."""
    logit_rows: IntArray
    """[N]: tokens whose logits are wanted, in order."""
    logit_offsets: IntArray
    """[R + 1]: first wanted row of each segment."""
    longest: int
    """Tokens of the longest segment."""

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, lengths: tuple[int, ...], logits_from: tuple[int, ...]) -> BatchLayout:
        """Of R segments with so many tokens each, of which the first ``logits_from`` want no logits."""
        sizes, silent = np.array(lengths, dtype=np.int64), np.array(logits_from, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        columns = np.arange(offsets[-1]) - offsets[:-1].repeat(sizes)
        arrays = (
            np.arange(len(lengths)).repeat(sizes),
            columns,
            offsets,
            np.flatnonzero(columns >= silent.repeat(sizes)),
            np.concatenate([[0], np.cumsum(sizes - silent)]),
        )
        for array in arrays:
            array.setflags(write=False)
        return cls(*arrays, longest=max(lengths))


@dataclass(frozen=True)
class StepBatch:
    """A ragged batch: B tokens of R segments, flat, segment by segment. All int64."""

    token_ids: IntArray
    """[B]"""
    positions: IntArray
    """[B]"""
    slots: IntArray
    """[R]: one slot a segment, all different."""
    layout: BatchLayout
    temperatures: FloatArray | None = None
    """[N], of the rows that want logits, float32; 0 where nobody draws; None where that is all of them."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def offsets(self) -> IntArray:
        return self.layout.offsets

    @property
    def logit_rows(self) -> IntArray:
        return self.layout.logit_rows

    @property
    def logit_offsets(self) -> IntArray:
        return self.layout.logit_offsets

    @classmethod
    def pack(cls, segments: Sequence[Segment]) -> StepBatch:
        """Lay the segments out one after another."""
        layout = BatchLayout.of(
            tuple(len(segment.token_ids) for segment in segments), tuple(segment.logits_from for segment in segments)
        )
        token_ids = itertools.chain.from_iterable(segment.token_ids for segment in segments)
        starts = np.array([segment.start for segment in segments], dtype=np.int64)
        temperatures = None
        if any(one.temperature and one.logits_from < len(one.token_ids) for one in segments):
            each = np.array([segment.temperature for segment in segments], dtype=np.float32)
            temperatures = each.repeat(np.diff(layout.logit_offsets))
        return cls(
            token_ids=np.fromiter(token_ids, dtype=np.int64, count=len(layout.columns)),
            positions=starts[layout.segment_of] + layout.columns,
            slots=np.array([segment.slot for segment in segments], dtype=np.int64),
            layout=layout,
            temperatures=temperatures,
        )


@dataclass(frozen=True)
class RankedRows:
    """The most probable K tokens of some rows of logits, in host memory, where the logits are not."""

    ids: IntArray
    """[N, K]"""
    logits: FloatArray
    """[N, K]: theirs, descending; of equal ones any may come first, and any be the last that is here."""
    exp_sum: FloatArray
    """[N]: sum(exp((logits - largest) / temperature)) over the whole row; of no meaning at temperature 0."""
    vocab_size: int
    """V: numbers in a whole row."""

    def __getitem__(self, rows: slice) -> RankedRows:
        return RankedRows(self.ids[rows], self.logits[rows], self.exp_sum[rows], self.vocab_size)


@dataclass(frozen=True)
class StepOutput:
    """Results of a step. All are views of buffers that the next step overwrites."""

    logits: Rows
    """[N, V], float32, as the model gives them. On a device they stay there until somebody reads a row."""
    argmax: IntArray
    """[N]: the first index of the largest logit of each row."""
    top_logit: FloatArray
    """[N]: that logit; NaN where any logit of the row is."""
    features: Rows
    """[B, taps * H]: residual stream after each tapped layer, concatenated in tap order."""
    ranked: RankedRows | None = None
    """Of all N rows, where the batch has temperatures and the stage ranks."""


@dataclass(frozen=True)
class RowMove:
    """Cached rows 0 .. length-1 of ``source`` go to ``target``."""

    source: int
    target: int
    length: int
