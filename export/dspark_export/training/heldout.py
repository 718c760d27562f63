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
from dspark_export.training.features import TargetPass
from dspark_export.training.shard import Dialogue

logger = logging.getLogger(__name__)

_ANCHORS_AT_ONCE = 64


@dataclass(frozen=True)
class HeldOutReport:
    """What greedy speculation would do on the held-out answers."""

    accepted_length: float
    """Mean tokens a round yields, bonus token included."""
    rounds: int
    conditional: tuple[float, ...]
    """How often the draft of each position stands where all before it did, over all anchors."""


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
    """Held-out dialogues with their features, computed once."""

    def __init__(self, target: TargetPass, dialogues: Sequence[Dialogue]) -> None:
        self._texts: list[tuple[Dialogue, Tensor]] = [
            (dialogue, torch.from_numpy(target.features(dialogue.tokens))) for dialogue in dialogues
        ]

    @torch.no_grad()
    def evaluate(self, drafter: TorchDrafter) -> HeldOutReport:
        """Walk all answers. The drafter computes as it is: no reduced precision."""
        size = drafter.spec.block_size
        rounds: list[int] = []
        reached, stood = np.zeros(size), np.zeros(size)
        for dialogue, features in self._texts:
            tokens = torch.from_numpy(dialogue.tokens.astype(np.int64))
            anchors = torch.arange(dialogue.prompt_length, len(tokens) - 1)
            if not len(anchors):
                continue
            drafted = torch.cat(
                [
                    drafter.forward_blocks(features, part, tokens).tokens
                    for part in torch.split(anchors, _ANCHORS_AT_ONCE)
                ]
            )
            # Behind the end stands no token, and none equals it.
            padded = torch.cat([tokens, torch.full((size,), -1)])
            following = padded[anchors[:, None] + 1 + torch.arange(size)]
            standing = matches(drafted.numpy(), following.numpy())
            rounds += walk(standing)
            room = (following >= 0).sum(dim=1).numpy()
            for slot in range(size):
                judged = (standing >= slot) & (room > slot)
                reached[slot] += judged.sum()
                stood[slot] += (standing[judged] > slot).sum()
        conditional = tuple((stood / np.maximum(reached, 1)).tolist())
        accepted_length = float(np.mean(rounds)) + 1.0 if rounds else float("nan")
        return HeldOutReport(accepted_length, len(rounds), conditional)
