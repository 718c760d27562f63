"""Counts over the first text of a run: which tokens the target uses, and what follows what.

Counts are soft: every position adds the target's whole distribution instead of the one token that was drawn. That says
far more than the text itself, which is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.stages.batch import FloatArray
from dspark_export.training.features import TargetPass
from dspark_export.training.shard import Dialogue

_FOLLOWERS = 64
"""Most probable next tokens of a position that count as bigrams."""


@dataclass(frozen=True)
class TokenStatistics:
    """Soft counts; ``tokens[i]`` was followed by ``next_tokens[i]`` with the sum of probabilities ``mass[i]``."""

    unigrams: NDArray[np.float64]
    """[V]: sums to the number of positions."""
    tokens: NDArray[np.int64]
    """[N], ascending."""
    next_tokens: NDArray[np.int64]
    """[N], ascending for each token."""
    mass: NDArray[np.float64]
    """[N]"""


def count_tokens(target: TargetPass, dialogues: Sequence[Dialogue], vocab_size: int) -> TokenStatistics:
    """Statistics over the answers."""
    unigrams = np.zeros(vocab_size, dtype=np.float64)
    pairs: list[NDArray[np.int64]] = []
    masses: list[FloatArray] = []
    for dialogue in dialogues:
        wanted = np.arange(len(dialogue.tokens)) >= dialogue.prompt_length - 1
        tops: list[torch.return_types.topk] = []

        def take(logits: Tensor, tops: list[torch.return_types.topk] = tops) -> None:
            probabilities = logits.softmax(dim=-1)
            unigrams.__iadd__(probabilities.sum(dim=0).double().numpy())
            tops.append(probabilities.topk(min(_FOLLOWERS, vocab_size), dim=-1))

        target.logits(dialogue.tokens, wanted, take)
        mass = torch.cat([top.values for top in tops]).numpy()
        following = torch.cat([top.indices for top in tops]).numpy()
        pairs.append((dialogue.tokens[wanted].astype(np.int64)[:, None] * vocab_size + following).ravel())
        masses.append(mass.ravel())
    unique, place = np.unique(np.concatenate(pairs), return_inverse=True)
    total = np.bincount(place, weights=np.concatenate(masses), minlength=len(unique)).astype(np.float64)
    return TokenStatistics(unigrams, unique // vocab_size, unique % vocab_size, total)


def most_frequent(unigrams: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The ``count`` tokens with the largest counts, ascending: ``d2t``. Of equal counts the lower id is taken."""
    return np.sort(np.argsort(-unigrams, kind="stable")[:count]).astype(np.int64)
