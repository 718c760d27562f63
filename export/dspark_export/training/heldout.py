"""Accepted length on text that is never trained on, without drafting: along a greedy answer a draft stands exactly
where the drafter's most probable token, given the answer so far, is the answer's next one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_export.torch_drafter import TorchDrafter
from dspark_export.training.batch import Example

logger = logging.getLogger(__name__)

_BLOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class HeldOutReport:
    """What greedy speculation would do on the held-out answers."""

    accepted_length: float
    """Mean tokens a round yields, bonus token included."""
    rounds: int
    conditional: tuple[float, ...]
    """How often the draft of each position stands where all before it did, over all anchors."""
    by_domain: tuple[tuple[str, float], ...]
    """Accepted length of each domain, in the order of their names."""


def matches(drafted: NDArray[np.int64], following: NDArray[np.int64]) -> NDArray[np.int64]:
    """Leading drafts that equal the text: ``drafted`` [A, g] against ``following`` [A, g]; int64 [A]."""
    standing: NDArray[np.int64] = np.cumprod(drafted == following, axis=1).sum(axis=1)
    return standing


def walk(standing: NDArray[np.int64]) -> list[int]:
    """Drafts that stand in each round of speculation along an answer.

    ``standing`` [n]: how many would stand behind anchor i; i + 1 is the token after it and n the last of the answer. A
    round ends with a token of the target's own, so that no more drafts count than are followed by one.
    """
    rounds, place = [], 0
    while place < len(standing):
        accepted = min(int(standing[place]), len(standing) - place - 1)
        rounds.append(accepted)
        place += accepted + 1
    return rounds


class HeldOut:
    """Held-out dialogues with what is recorded of them."""

    def __init__(self, examples: Sequence[Example], columns: Tensor | None) -> None:
        """``columns`` int64: the features that the drafter reads of those recorded; None for all."""
        self._examples = [example for example in examples if example.dialogue.num_anchors > 0]
        self._columns = columns

    @property
    def domains(self) -> list[str]:
        return sorted({example.dialogue.domain for example in self._examples})

    @torch.no_grad()
    def evaluate(self, drafter: TorchDrafter) -> HeldOutReport:
        """Walk all answers. The drafter computes as it is: no reduced precision."""
        size = drafter.spec.block_size
        rounds: dict[str, list[int]] = {domain: [] for domain in self.domains}
        reached, stood = np.zeros(size), np.zeros(size)
        for example in self._examples:
            standing, room = self._standing(drafter, example)
            rounds[example.dialogue.domain] += walk(standing)
            for slot in range(size):
                judged = (standing >= slot) & (room > slot)
                reached[slot] += judged.sum()
                stood[slot] += (standing[judged] > slot).sum()
        conditional = tuple((stood / np.maximum(reached, 1)).tolist())
        every = [accepted for found in rounds.values() for accepted in found]
        by_domain = tuple((domain, _mean_length(found)) for domain, found in rounds.items())
        return HeldOutReport(_mean_length(every), len(every), conditional, by_domain)

    def _standing(self, drafter: TorchDrafter, example: Example) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Drafts that stand behind each anchor of an answer, and how many tokens follow it, up to a block."""
        dialogue, size = example.dialogue, drafter.spec.block_size
        tokens = torch.from_numpy(dialogue.tokens.astype(np.int64))
        features = example.record.features if self._columns is None else example.record.features[:, self._columns]
        anchors = torch.arange(dialogue.prompt_length, len(tokens) - 1)
        found = drafter.hidden_blocks(features.float(), anchors, tokens)
        drafted = torch.cat(
            [
                drafter.score(found.hidden[part], found.previous[part]).tokens
                for part in torch.split(torch.arange(len(anchors)), _BLOCKS_AT_ONCE)
            ]
        )
        # Behind the end stands no token, and none equals it.
        padded = torch.cat([tokens, torch.full((size,), -1)])
        following = padded[anchors[:, None] + 1 + torch.arange(size)]
        return matches(drafted.numpy(), following.numpy()), (following >= 0).sum(dim=1).numpy()


def _mean_length(rounds: Sequence[int]) -> float:
    return float(np.mean(rounds)) + 1.0 if rounds else float("nan")
