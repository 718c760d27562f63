"""What changes along a run: learning rate and weight averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["cosine", "wsd"]

_FLOOR = 0.05


def learning_rate(
    peak: float, step: int, warmup_steps: int, progress: float, schedule: Schedule = "cosine", decay_share: float = 0.2
) -> float:
    """Linear over the first steps (from 0), then by ``progress`` through the budget, 0 to 1.

    ``cosine``: half a cosine down to 5% of the peak. ``wsd`` (warm up, stay, decay): the peak up to the last
    ``decay_share`` of the budget, in which it falls linearly to 0. While it stays, a budget may still be made longer.
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "wsd":
        return peak * warm * min(1.0, (1.0 - progress) / decay_share)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * warm * (_FLOOR + (1.0 - _FLOOR) * cosine)


def average_decay(decay: float, step: int) -> float:
    """Decay of the averaged weights at a step: lower at first, so that the start is soon forgotten."""
    return min(decay, (1.0 + step) / (10.0 + step))


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], current: Mapping[str, Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * current, in place; integer tensors are copied."""
    for name, value in current.items():
        if value.is_floating_point():
            average[name].lerp_(value, 1.0 - decay)
        else:
            average[name].copy_(value)
