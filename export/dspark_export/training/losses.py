"""The loss of a block (DESIGN, "Training"): pure functions on tensors.

A blocks of g slots; Vd tokens that the drafter can propose, of which K are known to matter to the target at a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark_export.training.picked import picked_log_probabilities

OUTSIDE = -1
"""Label of a token that the drafter cannot propose."""


@dataclass(frozen=True)
class BlockTargets:
    """What the target says about each slot."""

    ids: Tensor
    """int64 [A, g, K]: the target's most probable tokens as indices of the draft vocabulary; those that it lacks have
    probability 0 here and any index."""
    probabilities: Tensor
    """[A, g, K]: they need not sum to 1."""
    labels: Tensor
    """int64 [A, g]: the text's token as an index of the draft vocabulary, or OUTSIDE."""
    weights: Tensor
    """[A, g]: of each slot in the loss; 0 behind the end of the text."""

    def part(self, slots: slice) -> BlockTargets:
        """Some of the blocks."""
        return BlockTargets(self.ids[slots], self.probabilities[slots], self.labels[slots], self.weights[slots])


@dataclass(frozen=True)
class LossWeights:
    """How the parts are mixed."""

    ce: float = 0.1
    l1: float = 0.9
    confidence: float = 1.0
    distribution: float = 0.0
    """Of the cross entropy to the target's distribution instead of to the text's one token."""


@dataclass(frozen=True)
class BlockLosses:
    """Sums over slots, each weighted by its ``BlockTargets.weights``; divide by the weights' sum for a mean."""

    total: Tensor
    ce: Tensor
    l1: Tensor
    confidence: Tensor
    matched: Tensor
    """Of slots: where the most probable token is the text's."""


def position_weights(block_size: int, decay: float) -> Tensor:
    """exp(-k / decay) for slots k = 0 .. g-1, float32 [g]."""
    return torch.exp(-torch.arange(block_size, dtype=torch.float32) / decay)


def l1_distance(draft: Tensor, target: Tensor) -> Tensor:
    """||p_draft - p_target||_1 over the whole vocabulary, [...], of probabilities [..., K] of the same K tokens each.

    What is left of either distribution counts as distance: the drafter cannot win it, or (where the K tokens are only
    the target's most probable ones) is taken not to. That errs upwards by at most twice what is left of the target's.
    Twice the total variation, hence from 0 to 2.
    """
    left = (1.0 - draft.sum(dim=-1)).clamp(min=0.0) + (1.0 - target.sum(dim=-1)).clamp(min=0.0)
    return (draft - target).abs().sum(dim=-1) + left


def block_losses(
    draft_logits: Tensor, confidence_logits: Tensor, targets: BlockTargets, weights: LossWeights
) -> BlockLosses:  # fmt: skip
    """Losses of ``draft_logits`` [A, g, Vd] and ``confidence_logits`` [A, g].

    The confidence learns 1 - TV, the chance that a draft stands; no gradient flows from it into the distributions.
    """
    known = targets.labels != OUTSIDE
    ids = torch.cat([targets.ids, targets.labels.clamp(min=0)[..., None]], dim=-1)
    log_draft, best = picked_log_probabilities(draft_logits, ids)
    log_top, picked = log_draft[..., :-1], log_draft[..., -1]
    ce = -(picked * known * targets.weights).sum()
    distance = l1_distance(log_top.exp() * (targets.probabilities > 0), targets.probabilities)
    l1 = (distance * targets.weights).sum()
    acceptance = (1.0 - 0.5 * distance.detach()).clamp(0.0, 1.0)
    surprise = nn.functional.binary_cross_entropy_with_logits(confidence_logits.float(), acceptance, reduction="none")
    confidence = (surprise * targets.weights).sum()
    total = weights.ce * ce + weights.l1 * l1 + weights.confidence * confidence
    if weights.distribution:
        soft = -(log_top * targets.probabilities).sum(dim=-1)
        total = total + weights.distribution * (soft * targets.weights).sum()
    matched = ((picked.detach() >= best) & known) * targets.weights
    return BlockLosses(total, ce.detach(), l1.detach(), confidence.detach(), matched.sum())
