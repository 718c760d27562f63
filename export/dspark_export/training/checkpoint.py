"""The state of a run on disk: all that the next step depends on."""

from __future__ import annotations

import os
import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_export.errors import ExportError

CHECKPOINT_FILE = "checkpoint.pt"
_FORMAT = 2


@dataclass(frozen=True)
class Position:
    """How far a run is."""

    step: int = 0
    round: int = 0
    """Of the corpus: new shards, mixed with older ones."""
    offset: int = 0
    """Dialogues of the round that are done."""
    shards: int = 0
    """Shards, the held-out one not counted, that the round is made of."""
    fresh: int = 0
    """How many of them are new in it."""
    seen_tokens: int = 0
    """Answer tokens trained on, repeats counted."""
    seconds: float = 0.0
    """Time spent, earlier sittings included."""


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps."""

    identity: dict[str, Any]
    """Settings that a resumed run must share."""
    config: dict[str, Any]
    """The drafter's config.json."""
    feature_scale: Tensor
    """[F]: what the features are multiplied with before they reach ``fc``."""
    precision: str
    position: Position
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimisers: dict[str, Any]
    random_state: dict[str, Any]
    """Of torch, numpy and Python."""


def random_state() -> dict[str, Any]:
    """States of the global generators, in types that a safe reader accepts."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it; a kill at any time leaves the old one or the new one."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    content |= {"position": asdict(checkpoint.position), "format": _FORMAT}
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises ExportError where the file is damaged or of another format."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("format") != _FORMAT:
            raise ValueError("another format")
        content["position"] = Position(**content["position"])
        return Checkpoint(**content)
    except Exception as error:  # torch raises what the archive, the unpickler or the file system does
        raise ExportError(
            f"{path}: expected the checkpoint of a training run, got {error}; train anew into another --out"
        ) from error


def check_identity(stored: dict[str, Any], wanted: dict[str, Any], verifier_hash: str) -> None:
    """Make sure that a run can be continued with these settings.

    Raises:
        ExportError: an option differs; the message names it.
    """
    for name, value in {**wanted, "verifier_hash": verifier_hash}.items():
        if stored.get(name) != value:
            option = "--verifier" if name == "verifier_hash" else f"--{name.replace('_', '-')}"
            raise ExportError(
                f"--resume: the run was started with {option} {stored.get(name)}, now it is {value}; give the same, or "
                "train anew into another --out"
            )
