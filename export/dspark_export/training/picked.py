"""Log-probabilities of a few tokens out of many logits, with a backward pass that makes one array of them, not five."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``logits`` [n, V] of any float type, ``ids`` int64 [n, K]."""
        wide = logits.float() if logits.dtype != torch.float32 else logits.clone()
        total = wide.logsumexp(dim=-1, keepdim=True)
        best = wide.amax(dim=-1, keepdim=True) - total
        picked = wide.gather(-1, ids) - total
        ctx.wide, ctx.total, ctx.ids, ctx.dtype = wide, total, ids, logits.dtype
        ctx.mark_non_differentiable(best)
        return picked, best.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # d(z_i - log sum exp z) / dz_j = [i = j] - p_j; in place, so that it works once.
        picked = gradients[0]
        result = ctx.wide.sub_(ctx.total).exp_().mul_(-picked.sum(dim=-1, keepdim=True))
        result.scatter_add_(-1, ctx.ids, picked)
        ctx.wide = None
        return result.to(ctx.dtype), None


def picked_log_probabilities(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of ``logits`` [..., V] at ``ids`` int64 [..., K], and its maximum: float32 [..., K] and [...].

    Backward runs once only; no gradient flows through the maximum.
    """
    shape = logits.shape[:-1]
    picked, best = _Picked.apply(logits.flatten(0, -2), ids.flatten(0, -2))  # type: ignore[no-untyped-call]
    return picked.unflatten(0, shape), best.unflatten(0, shape)
