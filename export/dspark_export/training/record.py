"""What the target says along a dialogue: features of every position, and its distribution over each next token of the
answer, of which the most probable tokens are kept.

The distance to a distribution of which only the K most probable tokens are known is taken as if the drafter never
agreed with the target on any other token. It errs upwards, by at most twice the probability that is left over
(``rest``): below 0.01 on average where K = 128 of a chat model's 49152 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 128
"""Most probable tokens of a position that are kept."""


@dataclass(frozen=True)
class TargetRecord:
    """T - 1 positions (nothing follows the last token) and the N tokens of an answer."""

    features: Tensor
    """bfloat16 [T - 1, F]"""
    top_ids: Tensor
    """int32 [N, K]: row i is about the i-th token of the answer; most probable first."""
    top_probabilities: Tensor
    """float16 [N, K]"""
    rest: Tensor
    """float32 [N]: probability of all other tokens."""


def top_of(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``top_ids``, ``top_probabilities`` and ``rest`` of ``logits`` float32 [n, V]."""
    best, ids = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    probabilities = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
    rest = (1.0 - probabilities.sum(dim=-1)).clamp(min=0.0)
    return ids.to(torch.int32), probabilities.half(), rest
