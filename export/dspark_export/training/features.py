"""The target over a given text: features of every position, and its distribution where a loss needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.stages.batch import FloatArray, Segment, StepBatch
from dspark_backend.stages.protocol import VerifierStage
from dspark_export.training.record import TargetRecord, top_of
from dspark_export.training.shard import Dialogue

_CHUNK = 256
_CAPACITY_STEP = 128


class TargetPass:
    """Runs a verifier over texts, one at a time, in chunks. The stage must serve nobody else meanwhile."""

    def __init__(self, open_stage: Callable[[], VerifierStage]) -> None:
        """``open_stage`` is called when the first text comes; ``close`` ends what it gave."""
        self._open = open_stage
        self._stage: VerifierStage | None = None
        self._capacity = 0

    def close(self) -> None:
        """Give back the stage's memory; a later text opens another."""
        if self._stage is not None:
            self._stage.close()
        self._stage, self._capacity = None, 0

    def record(self, dialogue: Dialogue) -> TargetRecord:
        """What the target says along a dialogue: the same as was recorded while the engine wrote it."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        features = self.logits(
            dialogue.tokens[:-1], dialogue.prompt_length - 1, lambda logits: found.append(top_of(logits))
        )  # fmt: skip
        ids, probabilities, rest = (torch.cat(parts) for parts in zip(*found, strict=True))
        return TargetRecord(torch.from_numpy(features).bfloat16(), ids, probabilities, rest)

    def logits(
        self, tokens: NDArray[np.integer[Any]], first: int, take: Callable[[Tensor], object]
    ) -> FloatArray:  # fmt: skip
        """Features [T, F] of ``tokens`` [T].

        ``take`` gets the raw logits [n, V] behind position ``first`` and all later ones, in order and chunk by chunk: a
        view that the next chunk overwrites.
        """
        stage = self._stage = self._stage or self._open()
        # Attention costs what the slot holds, not what is used of it.
        capacity = -(-len(tokens) // _CAPACITY_STEP) * _CAPACITY_STEP
        if capacity != self._capacity:
            stage.allocate(1, capacity, ())
            self._capacity = capacity
        pieces = []
        for start in range(0, len(tokens), _CHUNK):
            piece = tokens[start : start + _CHUNK].tolist()
            silent = min(max(first - start, 0), len(piece))
            output = stage.step(StepBatch.pack([Segment(0, start, piece, silent)]))
            pieces.append(output.features.copy())
            if silent < len(piece):
                take(torch.from_numpy(output.logits))
        return np.concatenate(pieces)
