"""Dialogues on disk: token ids, a file a shard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dspark_export.errors import ExportError


@dataclass(frozen=True)
class Dialogue:
    """A prompt and the target's answer."""

    tokens: NDArray[np.int32]
    """[T]"""
    prompt_length: int
    """Of the T tokens."""
    sampled: bool
    """Answered at temperature 1; else greedily."""
    key: int
    """Of its prompt, to tell duplicates."""
    domain: str
    """What its prompt is about: of its opening or its file."""

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def num_anchors(self) -> int:
        """Positions of the answer that have a token behind them to predict."""
        return self.answer_length - 1


def save_shard(path: Path, dialogues: Sequence[Dialogue]) -> None:
    """Write a shard; it is there in whole or not at all."""
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as stream:
        np.savez(
            stream,
            tokens=np.concatenate([dialogue.tokens for dialogue in dialogues]).astype(np.int32),
            lengths=np.array([len(dialogue.tokens) for dialogue in dialogues], dtype=np.int64),
            prompt_lengths=np.array([dialogue.prompt_length for dialogue in dialogues], dtype=np.int64),
            sampled=np.array([dialogue.sampled for dialogue in dialogues], dtype=np.bool_),
            keys=np.array([dialogue.key for dialogue in dialogues], dtype=np.uint64),
            domains=np.array([dialogue.domain for dialogue in dialogues], dtype=np.str_),
        )
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)


def load_shard(path: Path) -> list[Dialogue]:
    """Raises ExportError where the file is no shard."""
    try:
        with np.load(path) as stored:
            arrays = {
                name: stored[name] for name in ("tokens", "lengths", "prompt_lengths", "sampled", "keys", "domains")
            }
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ExportError(
            f"{path}: expected a shard of dialogues, got {error}; delete it, and it is made again"
        ) from error
    pieces = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
    columns = [arrays[name].tolist() for name in ("prompt_lengths", "sampled", "keys", "domains")]
    return [Dialogue(tokens, *row) for tokens, row in zip(pieces, zip(*columns, strict=True), strict=True)]
