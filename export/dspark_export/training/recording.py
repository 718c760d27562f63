"""A verifier that remembers what it said, so that text which it generates need not be run through it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_backend.stages.artifact import VerifierArtifact
from dspark_backend.stages.batch import IntArray, RowMove, StepBatch, StepOutput
from dspark_backend.stages.protocol import VerifierStage
from dspark_export.training.record import TOP, TargetRecord, top_of


@dataclass(frozen=True)
class _Track:
    """What a slot holds, up to the longest text."""

    tokens: IntArray
    """[L]"""
    features: Tensor
    """bfloat16 [L, F]"""
    top_ids: Tensor
    top_probabilities: Tensor
    rest: Tensor
    """[L, ...]: behind each position."""

    def copy(self) -> _Track:
        return _Track(
            self.tokens.copy(),
            self.features.clone(),
            self.top_ids.clone(),
            self.top_probabilities.clone(),
            self.rest.clone(),
        )


class RecordingStage:
    """Implements :class:`~dspark_backend.stages.protocol.VerifierStage` around another one."""

    def __init__(self, stage: VerifierStage, max_length: int) -> None:
        """``max_length``: most tokens of a text."""
        self._stage = stage
        # One more, behind the longest, is always free.
        self._length = max_length + 1
        self._tracks: dict[int, _Track] = {}
        self.recording = False
        """Set it between requests only. Prompts must not start from rows that were recorded for others."""

    @property
    def artifact(self) -> VerifierArtifact:
        return self._stage.artifact

    @property
    def lazy_memory(self) -> bool:
        return self._stage.lazy_memory

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self._stage.allocate(num_slots, capacity, moves)
        self._tracks = {move.target: self._tracks[move.source] for move in moves if move.source in self._tracks}

    def copy_rows(self, move: RowMove) -> None:
        self._stage.copy_rows(move)
        if move.source in self._tracks:
            self._tracks[move.target] = self._tracks[move.source].copy()

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self._stage.clear_rows(slot, first)

    def close(self) -> None:
        self._tracks.clear()
        self._stage.close()

    def step(self, batch: StepBatch) -> StepOutput:
        output = self._stage.step(batch)
        if self.recording:
            self._note(batch, output)
        return output

    def _note(self, batch: StepBatch, output: StepOutput) -> None:
        features = torch.from_numpy(output.features).bfloat16()
        ids, probabilities, rest = top_of(torch.from_numpy(output.logits))
        logit_positions = batch.positions[batch.logit_rows]
        for row, slot in enumerate(batch.slots.tolist()):
            first, last = int(batch.offsets[row]), int(batch.offsets[row + 1])
            start = int(batch.positions[first])
            track = self._tracks.get(slot)
            if track is None:
                track = self._tracks[slot] = self._new_track(features.shape[1], ids.shape[1])
            track.tokens[start : start + last - first] = batch.token_ids[first:last]
            # What the slot's last text left behind must not be taken for this one's.
            track.tokens[start + last - first :] = -1
            track.features[start : start + last - first] = features[first:last]
            wanted = slice(int(batch.logit_offsets[row]), int(batch.logit_offsets[row + 1]))
            places = torch.from_numpy(logit_positions[wanted])
            track.top_ids[places] = ids[wanted]
            track.top_probabilities[places] = probabilities[wanted]
            track.rest[places] = rest[wanted]

    def _new_track(self, feature_size: int, top: int) -> _Track:
        length = self._length
        return _Track(
            np.full(length, -1, dtype=np.int64),
            torch.empty((length, feature_size), dtype=torch.bfloat16),
            torch.empty((length, min(top, TOP)), dtype=torch.int32),
            torch.empty((length, min(top, TOP)), dtype=torch.float16),
            torch.empty(length),
        )

    def claim(self, tokens: Sequence[int], prompt_length: int) -> TargetRecord:
        """What was said along a text that has just ended, before its slot is used again.

        Raises:
            LookupError: no slot holds it.
        """
        fed = np.array(tokens[:-1], dtype=np.int64)
        for track in self._tracks.values():
            if np.array_equal(track.tokens[: len(fed)], fed) and track.tokens[len(fed)] == -1:
                answer = slice(prompt_length - 1, len(fed))
                return TargetRecord(
                    track.features[: len(fed)].clone(),
                    track.top_ids[answer].clone(),
                    track.top_probabilities[answer].clone(),
                    track.rest[answer].clone(),
                )
        raise LookupError("recorded text: no slot of the verifier holds it")
