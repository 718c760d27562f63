"""Log-probabilities of a few tokens out of many logits, with a backward pass that makes one array of them, not five."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``logits`` [n, V] of any float type, ``ids`` int64 [n, K]."""
        best = logits.amax(dim=-1, keepdim=True).float()
        picked = logits.gather(-1, ids).float()
        powers = logits.float() if logits.dtype != torch.float32 else logits.clone()
        total = powers.sub_(best).exp_().sum(dim=-1, keepdim=True)
        log_total = total.log()
        ctx.powers, ctx.total, ctx.ids, ctx.dtype = powers, total, ids, logits.dtype
        highest = -log_total.squeeze(-1)
        ctx.mark_non_differentiable(highest)
        return picked.sub_(best).sub_(log_total), highest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # d(z_i - log sum exp z) / dz_j = [i = j] - p_j; in place, so that it works once.
        picked = gradients[0]
        result = ctx.powers.mul_(-picked.sum(dim=-1, keepdim=True) / ctx.total)
        result.scatter_add_(-1, ctx.ids, picked)
        ctx.powers = None
        return result.to(ctx.dtype), None


def picked_log_probabilities(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of ``logits`` [..., V] at ``ids`` int64 [..., K], and its maximum: float32 [..., K] and [...].

    Backward runs once only; no gradient flows through the maximum.
    """
    shape = logits.shape[:-1]
    picked, best = _Picked.apply(logits.flatten(0, -2), ids.flatten(0, -2))  # type: ignore[no-untyped-call]
    return picked.unflatten(0, shape), best.unflatten(0, shape)
