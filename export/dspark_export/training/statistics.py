"""Counts over the first text of a run: which tokens the target uses, and what follows what.

Counts are soft: every position adds what is recorded of the target's distribution (its most probable tokens) instead
of the one token that was drawn. That says far more than the text itself, which is short.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_export.training.batch import Example

_FOLLOWERS = 64
"""Most probable next tokens of a position that count as bigrams."""


@dataclass(frozen=True)
class TokenStatistics:
    """Soft counts; ``tokens[i]`` was followed by ``next_tokens[i]`` with the sum of probabilities ``mass[i]``."""

    unigrams: NDArray[np.float64]
    """[V]: sums to nearly the number of positions."""
    tokens: NDArray[np.int64]
    """[N], ascending."""
    next_tokens: NDArray[np.int64]
    """[N], ascending for each token."""
    mass: NDArray[np.float64]
    """[N]"""


def count_tokens(examples: Iterable[Example], vocab_size: int) -> TokenStatistics:
    """Statistics over the answers."""
    unigrams = np.zeros(vocab_size, dtype=np.float64)
    pairs: list[NDArray[np.int64]] = []
    masses: list[NDArray[np.float64]] = []
    for example in examples:
        dialogue, record = example.dialogue, example.record
        before = dialogue.tokens[dialogue.prompt_length - 1 : -1].astype(np.int64)
        ids, mass = record.top_ids.numpy().astype(np.int64), record.top_probabilities.numpy().astype(np.float64)
        unigrams += np.bincount(ids.ravel(), weights=mass.ravel(), minlength=vocab_size)
        pairs.append((before[:, None] * vocab_size + ids[:, :_FOLLOWERS]).ravel())
        masses.append(mass[:, :_FOLLOWERS].ravel())
    unique, place = np.unique(np.concatenate(pairs), return_inverse=True)
    total = np.bincount(place, weights=np.concatenate(masses), minlength=len(unique)).astype(np.float64)
    return TokenStatistics(unigrams, unique // vocab_size, unique % vocab_size, total)


def most_frequent(unigrams: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The ``count`` tokens with the largest counts, ascending: ``d2t``. Of equal counts the lower id is taken."""
    return np.sort(np.argsort(-unigrams, kind="stable")[:count]).astype(np.int64)
