"""Scoring a prompt with the verifier alone: what the model would say at every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import InvalidRequest
from dspark_backend.kv_cache import capacity_for
from dspark_backend.sampling import log_probability
from dspark_backend.stages.batch import FloatArray, IntArray, Segment, StepBatch
from dspark_backend.stages.protocol import VerifierStage
from dspark_backend.stages.tensorrt.limits import largest_scored

CHUNK = 256


@dataclass(frozen=True)
class Score:
    """What the target says about a prompt of T tokens."""

    argmax: IntArray
    """[T]: the most probable next token after each."""
    log_probs: NDArray[np.float64]
    """[T]: log-probability of each token given those before it; 0 for the first."""
    logits: FloatArray | None
    """[T, V], only where asked for."""


def score(stage: VerifierStage, token_ids: Sequence[int], want_logits: bool) -> Score:
    """Run a prompt through the stage's first slot, in chunks.

    Raises:
        InvalidRequest: the prompt is empty, too long or outside the vocabulary.
    """
    artifact, count = stage.artifact, len(token_ids)
    if not 1 <= count <= artifact.max_context:
        raise InvalidRequest(f"input_ids: expected 1 to {artifact.max_context} tokens, got {count}")
    for token in token_ids:
        if not 0 <= token < artifact.vocab_size:
            raise InvalidRequest(f"input_ids: expected ids from 0 to {artifact.vocab_size - 1}, got {token}")
    stage.allocate(1, capacity_for(count), ())
    argmax = np.empty(count, dtype=np.int64)
    log_probs = np.zeros(count)
    logits = np.empty((count, artifact.vocab_size), dtype=np.float32) if want_logits else None
    chunk = largest_scored(artifact, CHUNK)
    for start in range(0, count, chunk):
        piece = token_ids[start : start + chunk]
        end = start + len(piece)
        output = stage.step(StepBatch.pack([Segment(0, start, piece, 0)]))
        argmax[start:end] = output.argmax
        following = token_ids[start + 1 : end + 1]
        if following:
            log_probs[start + 1 : start + 1 + len(following)] = log_probability(
                np.asarray(output.logits[: len(following)]), following
            )
        if logits is not None:
            logits[start:end] = output.logits
    return Score(argmax, log_probs, logits)
