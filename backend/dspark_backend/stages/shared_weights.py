"""What a drafter's graph only names and its verifier's artifact holds: token embedding and LM head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import DrafterArtifact, VerifierArtifact
from dspark_backend.stages.batch import IntArray
from dspark_backend.stages.int8 import int8_matrix

D2T_FILE = "d2t.npy"
SHARED_EMBEDDING = "shared.embedding"
SHARED_HEAD = "shared.head"
"""float32 [Vd, H], or int8 [H, Vd] for a drafter in int8."""
SHARED_HEAD_SCALES = "shared.head.scales"
"""float32 [Vd], for a drafter in int8."""


def shared_weights(
    drafter: DrafterArtifact, directory: Path, verifier: VerifierArtifact, verifier_directory: Path
) -> dict[str, NDArray[Any]]:
    """The initializers that the draft graph needs, by name; the embedding is memory-mapped.

    Raises:
        ArtifactError: the table of a reduced draft vocabulary is damaged.
    """
    head = verifier.head.read(verifier_directory)
    if drafter.draft_vocab_size != drafter.vocab_size:
        head = np.ascontiguousarray(head[read_d2t(drafter, directory)])
    shared: dict[str, NDArray[Any]] = {SHARED_EMBEDDING: verifier.embedding.read(verifier_directory)}
    if drafter.dtype == "int8":
        matrix = int8_matrix(np.ascontiguousarray(head.T))
        return shared | {SHARED_HEAD: matrix.values, SHARED_HEAD_SCALES: matrix.scales}
    return shared | {SHARED_HEAD: head}


def read_d2t(drafter: DrafterArtifact, directory: Path) -> IntArray:
    """The target's tokens of a reduced draft vocabulary, int64 [Vd]. Raises ArtifactError where it is damaged."""
    table = np.load(directory / D2T_FILE)
    size = drafter.draft_vocab_size
    inside = table.shape == (size,) and table.min() >= 0 and table.max() < drafter.vocab_size
    # A token proposed at two places would count only one share of its probability.
    if not inside or len(np.unique(table)) != size:
        raise ArtifactError(
            f"{directory / D2T_FILE}: expected {size} different token ids below {drafter.vocab_size}; "
            "export the drafter again"
        )
    return np.asarray(table, dtype=np.int64)
