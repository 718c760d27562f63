"""The target over a given text: features of every position, and its distribution where a loss needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.stages.batch import FloatArray, Segment, StepBatch
from dspark_backend.stages.protocol import VerifierStage

_CHUNK = 256
_CAPACITY_STEP = 128


@dataclass(frozen=True)
class TargetRows:
    """The target's distribution at N positions, restricted to the draft vocabulary."""

    probabilities: Tensor
    """float32 [N, Vd]"""
    outside: Tensor
    """float32 [N]: probability of the tokens that cannot be proposed."""


def restricted(logits: Tensor, kept: Tensor | None) -> TargetRows:
    """Softmax of ``logits`` [N, V] over the whole vocabulary, of which only the ids ``kept`` int64 [Vd] are kept."""
    if kept is None:
        return TargetRows(logits.softmax(dim=-1), torch.zeros(len(logits)))
    probabilities = (logits[:, kept] - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return TargetRows(probabilities, (1.0 - probabilities.sum(dim=-1)).clamp(min=0.0))


class TargetPass:
    """Runs a verifier over texts, one at a time, in chunks. The stage must serve nobody else meanwhile."""

    def __init__(self, stage: VerifierStage, kept: Tensor | None = None) -> None:
        """``kept`` int64 [Vd]: the draft vocabulary; None where it is the target's."""
        self._stage = stage
        self._capacity = 0
        self.kept = kept

    def features(self, tokens: NDArray[np.integer[Any]]) -> FloatArray:
        """[T, F] of ``tokens`` [T]."""
        return self._run(tokens, np.zeros(len(tokens), dtype=bool), lambda logits: None)

    def rows(self, tokens: NDArray[np.integer[Any]], wanted: NDArray[np.bool_]) -> tuple[FloatArray, TargetRows]:
        """Features [T, F], and the distribution behind each position of the mask ``wanted`` [T], in order."""
        found: list[TargetRows] = []
        features = self._run(tokens, wanted, lambda logits: found.append(restricted(logits, self.kept)))
        return features, TargetRows(
            torch.cat([rows.probabilities for rows in found]), torch.cat([rows.outside for rows in found])
        )

    def logits(
        self, tokens: NDArray[np.integer[Any]], wanted: NDArray[np.bool_], take: Callable[[Tensor], None]
    ) -> FloatArray:  # fmt: skip
        """As ``rows``, but ``take`` gets the raw logits [n, V] of each chunk: a view that the next chunk overwrites."""
        return self._run(tokens, wanted, take)

    def _run(
        self, tokens: NDArray[np.integer[Any]], wanted: NDArray[np.bool_], take: Callable[[Tensor], object]
    ) -> FloatArray:  # fmt: skip
        # Attention costs what the slot holds, not what is used of it.
        capacity = -(-len(tokens) // _CAPACITY_STEP) * _CAPACITY_STEP
        if capacity != self._capacity:
            self._stage.allocate(1, capacity, ())
            self._capacity = capacity
        pieces = []
        for start in range(0, len(tokens), _CHUNK):
            piece = tokens[start : start + _CHUNK].tolist()
            rows = np.flatnonzero(wanted[start : start + _CHUNK])
            batch = replace(
                StepBatch.pack([Segment(0, start, piece, len(piece))]),
                logit_rows=rows,
                logit_offsets=np.array([0, len(rows)], dtype=np.int64),
            )
            output = self._stage.step(batch)
            pieces.append(output.features)
            if len(rows):
                take(torch.from_numpy(output.logits))
        return np.concatenate(pieces)
