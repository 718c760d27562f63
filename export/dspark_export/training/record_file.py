"""Records on disk, a file a shard beside it: about 2 F + 520 bytes a token, read a dialogue at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dspark_export.errors import ExportError
from dspark_export.training.record import TargetRecord
from dspark_export.training.shard import Dialogue

_NAMES = ("features", "top_ids", "top_probabilities", "rest")


def save_records(path: Path, records: Sequence[TargetRecord]) -> None:
    """Write the records of a shard, in order; the file is there in whole or not at all."""
    scratch = path.with_suffix(".tmp")
    save_file({name: torch.cat([getattr(record, name) for record in records]) for name in _NAMES}, scratch)
    with scratch.open("rb") as stream:
        os.fsync(stream.fileno())
    scratch.replace(path)


class RecordFile:
    """The records of a shard, memory-mapped."""

    def __init__(self, path: Path, dialogues: Sequence[Dialogue], feature_size: int) -> None:
        """Raises ExportError where the file is damaged, or not of these dialogues."""
        self._answers, self._positions = [0], [0]
        for dialogue in dialogues:
            self._answers.append(self._answers[-1] + dialogue.answer_length)
            self._positions.append(self._positions[-1] + len(dialogue.tokens) - 1)
        try:
            with safe_open(path, framework="pt") as stored:
                self._parts = {name: stored.get_tensor(name) for name in _NAMES}
        except (SafetensorError, OSError) as error:
            raise ExportError(
                f"{path}: expected what the target said along a shard, got {error}; delete it, and it is made again"
            ) from error
        found = tuple(self._parts["features"].shape), len(self._parts["rest"])
        wanted = (self._positions[-1], feature_size), self._answers[-1]
        if found != wanted:
            raise ExportError(
                f"{path}: expected features of shape {wanted[0]} and {wanted[1]} distributions, got {found[0]} and "
                f"{found[1]}: they are of another verifier or shard; delete it, and it is made again"
            )

    def read(self, row: int) -> TargetRecord:
        """Of the ``row``-th dialogue: views of the file."""
        positions = slice(self._positions[row], self._positions[row + 1])
        answer = slice(self._answers[row], self._answers[row + 1])
        parts = self._parts
        return TargetRecord(
            parts["features"][positions],
            parts["top_ids"][answer],
            parts["top_probabilities"][answer],
            parts["rest"][answer],
        )
