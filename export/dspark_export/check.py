"""Checks of a written verifier: it loads, gives finite numbers, the same ones twice, and the same ones in chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.batch import FloatArray, Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_backend.stages.protocol import VerifierStage
from dspark_export.errors import ExportError

_TOKENS = 24


def prompt_logits(stage: VerifierStage, token_ids: list[int], chunk: int) -> FloatArray:
    """Logits of every position of one sequence, float32 [len(token_ids), V], fed ``chunk`` tokens a step."""
    stage.allocate(1, len(token_ids), ())
    parts = []
    for start in range(0, len(token_ids), chunk):
        piece = token_ids[start : start + chunk]
        parts.append(stage.step(StepBatch.pack([Segment(0, start, piece, 0)])).logits.copy())
    return np.concatenate(parts)


def check_verifier(directory: Path) -> None:
    """Run a short text through the artifact.

    Raises:
        ExportError: the graph does not load, or its logits are not finite, or depend on how they were chunked.
    """
    try:
        stage = OnnxRuntimeVerifier(directory)
    except ArtifactError as error:
        raise ExportError(f"the written graph does not load: {error}") from error
    count = min(_TOKENS, stage.artifact.max_context)
    token_ids = np.random.default_rng(0).integers(0, stage.artifact.vocab_size, count).tolist()
    try:
        whole = prompt_logits(stage, token_ids, count)
        if not np.isfinite(whole).all():
            raise ExportError("the written graph gives logits that are not finite; is the checkpoint damaged?")
        for chunk in (count, 1, 5):
            if not np.array_equal(whole, prompt_logits(stage, token_ids, chunk)):
                raise ExportError(
                    f"the written graph is not deterministic on this machine: {count} tokens at once and in chunks of "
                    f"{chunk} give different logits"
                )
    finally:
        stage.close()
