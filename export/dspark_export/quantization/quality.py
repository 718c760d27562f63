"""How far a rounded model is from the float32 model: over text that no calibration saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dspark_backend.stages.batch import FloatArray


@dataclass(frozen=True)
class Quality:
    """Against float32, position by position."""

    tokens: int
    kl: float
    """Mean Kullback-Leibler divergence of the next-token distribution from float32's, nats."""
    top1: float
    """Share of positions with the same most probable token."""


def log_softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def measure_quality(
    reference: Callable[[Sequence[int]], FloatArray],
    measured: Callable[[Sequence[int]], FloatArray],
    texts: Sequence[Sequence[int]],
    progress: Callable[[float], None],
) -> Quality:
    """Both give logits [T, V] of a text; ``texts`` must hold a token."""

    def pairs() -> Iterator[tuple[FloatArray, FloatArray]]:
        for number, text in enumerate(texts):
            yield reference(text), measured(text)
            progress((number + 1) / len(texts))

    return compare_logits(pairs())


def compare_logits(pairs: Iterable[tuple[FloatArray, FloatArray]]) -> Quality:
    """Of pairs of logits [T, V], the reference's first; there must be a token."""
    divergence, same, tokens = 0.0, 0, 0
    for reference, measured in pairs:
        expected, found = log_softmax(reference), log_softmax(measured)
        divergence += float((np.exp(expected) * (expected - found)).sum(dtype=np.float64))
        same += int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
        tokens += len(expected)
    return Quality(tokens, divergence / tokens, same / tokens)
