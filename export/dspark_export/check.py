"""Checks of written artifacts: they load, give finite numbers, the same ones twice, and the same ones in chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.batch import FloatArray, Segment, StepBatch
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch, DraftOutput
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
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


def check_drafter(directory: Path, verifier_directory: Path) -> None:
    """Draft one block behind random features, twice.

    Raises:
        ExportError: the graphs do not load, give numbers that are not finite, or others the second time.
    """
    try:
        stage = OnnxRuntimeDrafter(directory, verifier_directory)
    except ArtifactError as error:
        raise ExportError(f"the written graphs do not load: {error}") from error
    try:
        first, second = (draft_once(stage, split) for split in (_TOKENS, 7))
        for name in ("tokens", "candidates", "probabilities", "confidence_logits"):
            one, other = getattr(first, name), getattr(second, name)
            if not np.isfinite(one).all():
                raise ExportError(f"the written graph gives {name} that are not finite; is the checkpoint damaged?")
            if not np.array_equal(one, other):
                raise ExportError(f"the written graph is not deterministic on this machine: {name} differ")
    finally:
        stage.close()


def draft_once(stage: OnnxRuntimeDrafter, split: int) -> DraftOutput:
    """A block behind some context rows, the first ``split`` of them through the context graph where fewer."""
    artifact, random = stage.artifact, np.random.default_rng(0)
    count = min(_TOKENS, artifact.max_context)
    features = random.standard_normal((count, artifact.feature_size), dtype=np.float32)
    stage.allocate(1, count + artifact.block_size, ())

    def rows(start: int, end: int) -> ContextRows:
        return ContextRows(features[start:end], np.arange(start, end), np.zeros(end - start, dtype=np.int64))

    if split < count:
        stage.commit_context(rows(0, split))
    ones = np.ones(1, dtype=np.float32)
    return stage.draft(
        DraftBatch(
            context=rows(split if split < count else 0, count),
            anchors=np.array([1]),
            slots=np.array([0]),
            starts=np.array([count]),
            uniforms=np.full((1, artifact.block_size), 0.5, dtype=np.float32),
            temperature=ones,
            top_k=np.array([artifact.num_candidates]),
            top_p=ones,
            min_p=0 * ones,
        )
    )
