"""YaRN: rotary embedding of a context longer than the model was trained on (Peng et al., arXiv 2309.00071)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dspark_export.decoder import Rope

FAST, SLOW = 32.0, 1.0
"""Turns within the original context from which a frequency is kept, and up to which it is divided in full."""


def divisors(parameters: Mapping[str, Any], plain: Rope, original: int) -> tuple[float, ...]:
    """What each frequency of ``plain`` is divided by: 1 where it turns often within the original context, ``factor``
    where it hardly turns, a blend of both frequencies between (section 3.2).

    Args:
        parameters: rope_parameters of a config, with ``factor``.
        original: positions that the model was trained on.
    """

    def pair(turns: float) -> float:
        return plain.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(plain.theta))

    low, high = pair(float(parameters.get("beta_fast") or FAST)), pair(float(parameters.get("beta_slow") or SLOW))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, plain.head_dim - 1)
    span = high - low if high != low else 0.001
    slowed = np.clip((np.arange(plain.head_dim // 2) - low) / span, 0.0, 1.0)
    return tuple((1.0 / (slowed / float(parameters["factor"]) + 1.0 - slowed)).tolist())


def amplitude(parameters: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied by, so that attention stays as sharp (section 3.4).

    Stated, or 0.1 ln(factor) + 1; DeepSeek's configs state two weights of the logarithm, of which the quotient counts.
    """
    stated = parameters.get("attention_factor")
    if stated is not None:
        return float(stated)
    factor, over, under = float(parameters["factor"]), parameters.get("mscale"), parameters.get("mscale_all_dim")
    if over and under:
        return _sharpness(factor, float(over)) / _sharpness(factor, float(under))
    return _sharpness(factor, 1.0)


def _sharpness(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
