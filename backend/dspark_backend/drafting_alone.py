"""Drafting one block with the drafter alone: what it would propose behind given features of the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.calibration import sigmoid
from dspark_backend.errors import InvalidRequest
from dspark_backend.kv_cache import capacity_for
from dspark_backend.request import LEAST_TEMPERATURE, SamplingParams
from dspark_backend.rng import Purpose, RngStreams
from dspark_backend.stages.artifact import DrafterArtifact
from dspark_backend.stages.batch import FloatArray, IntArray
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch
from dspark_backend.stages.protocol import DrafterStage

CHUNK = 256
_SAMPLING = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class DraftQuery:
    """Where to draft, and how to draw."""

    features: FloatArray
    """[T, F]: the target's features of positions 0 .. T-1; the anchor sits at position T."""
    anchor: int
    """The token at position T."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Its temperature, top_k, top_p and seed count; a draft knows no penalties."""


@dataclass(frozen=True)
class DraftBlock:
    """What the drafter proposes for the g positions behind the anchor."""

    tokens: IntArray
    """[g]"""
    confidence: NDArray[np.float64]
    """[g]: chance that a draft is accepted given that all before it were, not calibrated."""
    candidates: IntArray
    """[g, K]: tokens that could have been drawn."""
    probabilities: FloatArray
    """[g, K]: of each candidate, in the distribution that the token was drawn from."""


def parse_query(arrays: Mapping[str, NDArray[Any]]) -> DraftQuery:
    """The query that a set of input tensors spells; absent options are greedy drafting.

    Raises:
        InvalidRequest: features or anchor are missing or of another rank, or an option is out of range.
    """
    for name in ("features", "anchor"):
        if name not in arrays:
            raise InvalidRequest(f"{name}: expected a tensor, got none")
    features = arrays["features"]
    if features.ndim != 2:
        raise InvalidRequest(f"features: expected rows [T, F], got shape {list(features.shape)}")
    options = {name: _scalar(name, arrays[name]) for name in _SAMPLING if name in arrays}
    return DraftQuery(
        features=np.ascontiguousarray(features, dtype=np.float32),
        anchor=_scalar("anchor", arrays["anchor"]),
        sampling=SamplingParams(**options),
    )


def draft_alone(stage: DrafterStage, query: DraftQuery) -> DraftBlock:
    """Draft a block in the stage's first slot; the context goes in by chunks.

    The same seed draws the same block; without one each call draws its own.

    Raises:
        InvalidRequest: features or anchor do not fit the drafter.
    """
    artifact, start = stage.artifact, len(query.features)
    _check(query, artifact)
    stage.allocate(1, capacity_for(start + artifact.block_size), ())
    last = (start - 1) // CHUNK * CHUNK
    for first in range(0, last, CHUNK):
        stage.commit_context(_rows(query.features, first, first + CHUNK))
    output = stage.draft(_batch(query, artifact, _rows(query.features, last, start)))
    return DraftBlock(
        tokens=output.tokens[0],
        confidence=sigmoid(output.confidence_logits[0]),
        candidates=output.candidates[0],
        probabilities=output.probabilities[0],
    )


def _scalar(name: str, array: NDArray[Any]) -> Any:
    if array.size != 1:
        raise InvalidRequest(f"{name}: expected one value (shape [1]), got shape {list(array.shape)}")
    return array.reshape(-1)[0].item()


def _check(query: DraftQuery, artifact: DrafterArtifact) -> None:
    rows, width = query.features.shape
    taps = len(artifact.target_layer_ids)
    if width != taps * artifact.hidden_size:
        raise InvalidRequest(
            f"features: expected rows of {taps * artifact.hidden_size} numbers ({taps} layers of "
            f"{artifact.hidden_size}), got {width}"
        )
    if not 1 <= rows < artifact.max_context:
        raise InvalidRequest(f"features: expected 1 to {artifact.max_context - 1} rows, got {rows}")
    if not np.isfinite(query.features).all():
        raise InvalidRequest("features: expected finite numbers, got NaN or infinity")
    if not 0 <= query.anchor < artifact.vocab_size:
        raise InvalidRequest(f"anchor: expected an id from 0 to {artifact.vocab_size - 1}, got {query.anchor}")


def _rows(features: FloatArray, first: int, end: int) -> ContextRows:
    return ContextRows(
        features=features[first:end],
        positions=np.arange(first, end, dtype=np.int64),
        slots=np.zeros(end - first, dtype=np.int64),
    )


def _batch(query: DraftQuery, artifact: DrafterArtifact, context: ContextRows) -> DraftBatch:
    sampling = query.sampling
    if sampling.greedy:
        uniforms = np.zeros(artifact.block_size, dtype=np.float32)
        temperature, top_k = 1.0, 1
    else:
        uniforms = RngStreams(sampling.seed).uniforms(Purpose.DRAFT, artifact.block_size, np.float32)
        temperature = max(sampling.temperature, LEAST_TEMPERATURE)
        top_k = min(sampling.top_k if sampling.top_k > 0 else artifact.num_candidates, artifact.num_candidates)
    return DraftBatch(
        context=context,
        anchors=np.array([query.anchor], dtype=np.int64),
        slots=np.zeros(1, dtype=np.int64),
        starts=np.array([len(query.features)], dtype=np.int64),
        uniforms=np.ascontiguousarray(uniforms[None], dtype=np.float32),
        temperature=np.array([temperature], dtype=np.float32),
        top_k=np.array([top_k], dtype=np.int64),
        top_p=np.array([sampling.top_p], dtype=np.float32),
        min_p=np.zeros(1, dtype=np.float32),
    )
