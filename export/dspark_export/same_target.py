"""Whether a drafter was trained for the very target that was exported, where shapes alone cannot tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dspark_backend.stages.artifact import TensorLocation, VerifierArtifact
from dspark_backend.stages.batch import FloatArray, IntArray
from dspark_export.errors import ExportError
from dspark_export.weights import WeightSource

_ROWS = 64
_ALIKE = 0.7
"""Cosine between embeddings of one token: near 1 for the same target, 4-bit ones and finetunes included, near 0 for
another model."""


def check_same_target(weights: WeightSource, verifier: VerifierArtifact, directory: Path, name: str) -> None:
    """Compare some rows of the drafter's frozen embedding, where it carries one, with the verifier's.

    Raises:
        ExportError: they have nothing in common, so that the drafter is of another target.
    """
    if "embed_tokens.weight" not in weights.names():
        return
    ids = np.linspace(0, verifier.vocab_size - 1, _ROWS).astype(np.int64)
    own = weights.read("embed_tokens.weight")
    if own.shape != verifier.embedding.shape:
        return  # it is not used; the verifier's is
    mine, theirs = own[ids].astype(np.float32), _rows(verifier.embedding, directory, ids)
    norms = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (mine * theirs).sum(axis=1)[norms > 0] / norms[norms > 0]
    if len(cosines) and float(np.median(cosines)) < _ALIKE:
        raise ExportError(
            f"drafter {name} does not fit verifier {verifier.source}: expected the target's token embedding in it, got "
            f"another one (median cosine {float(np.median(cosines)):.2f}); use the drafter made for this model"
        )


def _rows(location: TensorLocation, directory: Path, ids: IntArray) -> FloatArray:
    """Rows of a stored matrix as float32, without reading the others."""
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
    stored = np.memmap(directory / location.file, kinds[location.dtype], "r", location.offset, location.shape)[ids]
    if location.dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(stored, dtype=np.float32)
