"""Training runs of a tiny Llama target whose text soon goes round in circles: quick to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tiny_llama
import torch
from artifacts import export

from dspark_export.training.checkpoint import CHECKPOINT_FILE, Checkpoint, load_checkpoint
from dspark_export.training.corpus_settings import CorpusSettings
from dspark_export.training.run import TrainingRun
from dspark_export.training.settings import TrainSettings
from dspark_export.training.status import RunReport, Status

SMALL: dict[str, Any] = {
    "tokens": 100_000,
    "rank": 8,
    "layers": 1,
    "draft_vocab": 64,
    "threads": 1,
    "shard_size": 16,
    "first_shards": 1,
    "held_out": 4,
    "answer_tokens": 24,
    "prompt_tokens": 8,
    "anchors": 16,
    "dialogues_per_step": 4,
    "warmup_steps": 2,
    "precision": "float32",
    "dtype": "float32",
}
"""A few seconds; the budget is never reached."""


@dataclass(frozen=True)
class Target:
    """A tiny target and its verifier."""

    model: Path
    verifier: Path

    def settings(self, out: Path, **changes: Any) -> TrainSettings:
        given = {**SMALL, **changes}
        names = {field.name for field in fields(CorpusSettings)}
        text = CorpusSettings(self.verifier, **{name: value for name, value in given.items() if name in names})
        return TrainSettings(
            text, str(self.model), out, **{name: value for name, value in given.items() if name not in names}
        )  # fmt: skip

    def command_line(self, out: Path, **changes: Any) -> list[str]:
        """Arguments of ``dspark-export train`` for the same settings."""
        given = {"verifier": self.verifier, "model": self.model, "out": out, **SMALL, **changes}
        return ["train", *(text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value)))]


def tiny_target(root: Path, tied: bool = True) -> Target:
    """Tied to its embedding, a random model soon repeats itself."""
    tiny_llama.make(root / "model", tie_word_embeddings=tied)
    return Target(root / "model", export(root / "model", root / "verifier"))


def never() -> bool:
    return False


def train(
    settings: TrainSettings,
    steps: int | None = None,
    resume: bool = False,
    watch: Callable[[Status], None] | None = None,
) -> RunReport:
    """Train up to this step of the whole run, or to the end of the budget."""
    reached = 0

    def show(status: Status) -> None:
        nonlocal reached
        reached = status.position.step
        if watch is not None:
            watch(status)

    return TrainingRun(settings, lambda: steps is not None and reached >= steps, show).run(resume)


def state_of(out: Path) -> Checkpoint:
    return load_checkpoint(out / CHECKPOINT_FILE)


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two nested states differ, to the last bit."""
    if isinstance(left, torch.Tensor):
        same = isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
        return [] if same else [path]
    if isinstance(left, dict):
        if not isinstance(right, dict) or left.keys() != right.keys():
            return [path]
        return [found for key in left for found in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return [path]
        return [
            found
            for index, pair in enumerate(zip(left, right, strict=True))
            for found in differences(*pair, f"{path}/{index}")
        ]
    return [] if left == right else [path]


def learned_differences(left: Checkpoint, right: Checkpoint) -> list[str]:
    """Differences of all that a run has learned and will draw; clocks do not count."""
    parts = ("model", "average", "optimisers", "random_state", "config", "feature_scale", "precision")
    found = [name for part in parts for name in differences(getattr(left, part), getattr(right, part), part)]
    counts = ("step", "round", "offset", "shards", "fresh", "seen_tokens")
    return found + [name for name in counts if getattr(left.position, name) != getattr(right.position, name)]
