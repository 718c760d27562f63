"""The loss of a block (DESIGN, "Training"): pure functions on tensors.

A blocks of g slots; Vd tokens that the drafter can propose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

OUTSIDE = -1
"""Label of a token that the drafter cannot propose."""


@dataclass(frozen=True)
class BlockTargets:
    """What the target says about each slot."""

    probabilities: Tensor
    """[A, g, Vd]: of the tokens that the drafter can propose; they need not sum to 1."""
    outside: Tensor
    """[A, g]: probability of all others. A drafter can never win it, so it counts as distance."""
    labels: Tensor
    """int64 [A, g]: the text's token as an index of the draft vocabulary, or OUTSIDE."""
    weights: Tensor
    """[A, g]: of each slot in the loss; 0 behind the end of the text."""


@dataclass(frozen=True)
class LossWeights:
    """How the three parts are mixed."""

    ce: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0


@dataclass(frozen=True)
class BlockLosses:
    """Sums over slots, each weighted by its ``BlockTargets.weights``; divide by the weights' sum for a mean."""

    total: Tensor
    ce: Tensor
    l1: Tensor
    confidence: Tensor


def position_weights(block_size: int, decay: float) -> Tensor:
    """exp(-k / decay) for slots k = 0 .. g-1, float32 [g]."""
    return torch.exp(-torch.arange(block_size, dtype=torch.float32) / decay)


def l1_distance(draft: Tensor, target: Tensor, outside: Tensor) -> Tensor:
    """||p_draft - p_target||_1 over the whole vocabulary, [...]: ``draft`` and ``target`` [..., Vd], ``outside`` [...].

    Twice the total variation, hence from 0 to 2.
    """
    return (draft - target).abs().sum(dim=-1) + outside


def block_losses(
    draft_logits: Tensor, confidence_logits: Tensor, targets: BlockTargets, weights: LossWeights
) -> BlockLosses:  # fmt: skip
    """Losses of ``draft_logits`` [A, g, Vd] and ``confidence_logits`` [A, g].

    The confidence learns 1 - TV, the chance that a draft stands; no gradient flows from it into the distributions.
    """
    log_draft = draft_logits.float().log_softmax(dim=-1)
    known = targets.labels != OUTSIDE
    picked = log_draft.gather(-1, targets.labels.clamp(min=0)[..., None]).squeeze(-1)
    ce = -(picked * known * targets.weights).sum()
    distance = l1_distance(log_draft.exp(), targets.probabilities, targets.outside)
    l1 = (distance * targets.weights).sum()
    acceptance = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)
    surprise = nn.functional.binary_cross_entropy_with_logits(confidence_logits.float(), acceptance, reduction="none")
    confidence = (surprise * targets.weights).sum()
    total = weights.ce * ce + weights.l1 * l1 + weights.confidence * confidence
    return BlockLosses(total, ce.detach(), l1.detach(), confidence.detach())
