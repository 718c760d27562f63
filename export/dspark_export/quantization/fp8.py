"""Scales of what fp8 products read, without calibration: an RMS norm bounds its output.

sum(x**2) = H before the weight, so that no channel exceeds sqrt(H) * |weight|. E4M3 is a floating format: with a bound
some powers of two above what comes, values keep their relative precision, and none saturates. What reads no norm (the
attention's output, the MLP's inner product, the drafter's features) has no such bound; those products keep the compute
dtype.
"""

from __future__ import annotations

import math

import numpy as np

from dspark_export.decoder import Decoder
from dspark_export.graph.blocks import gate_up_names, qkv_names
from dspark_export.graph.standard_linear import FP8_LARGEST
from dspark_export.quantization.plan import fused_name
from dspark_export.weights import WeightSource


def norm_scales(decoder: Decoder, weights: WeightSource, prefix: str) -> dict[str, float]:
    """Of the products that read a norm, by fused name. ``prefix`` stands before the number of a layer."""
    scales = {}
    for layer in range(decoder.num_layers):
        own = f"{prefix}{layer}"
        before = "pre_feedforward_layernorm" if decoder.branch_norms else "post_attention_layernorm"
        for names, norm in (
            (qkv_names(own, decoder.layer_attention(layer)), "input_layernorm"),
            (gate_up_names(own), before),
        ):
            scales[fused_name(names)] = norm_scale(weights, f"{own}.{norm}.weight", decoder.norm_offset)
    return scales


def norm_scale(weights: WeightSource, name: str, offset: bool = False) -> float:
    """Largest magnitude that the norm with this weight can give, / 448."""
    weight = weights.read(name).astype(np.float32) + (1.0 if offset else 0.0)
    return float(max(np.abs(weight).max(), 1e-6)) * math.sqrt(weight.size) / FP8_LARGEST
