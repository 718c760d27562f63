"""Readings of a Hugging Face config that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Rope, RopeScaling


def head_dim(config: Mapping[str, Any]) -> int:
    """Channels of a head: stated, or the hidden size split evenly."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def require_silu(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless the MLP is gated by SiLU."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act: expected 'silu', got {activation!r}")


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Rotary embedding of a config, in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters).

    Raises:
        ValueError: a rope_type that the graph cannot reproduce, or rotation of a part of the head.
    """
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    if float(parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor: expected 1.0; rotating a part of the head is not supported")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "factors"):
        raise ValueError(f"rope_type: expected default, linear or llama3, got {kind!r}")
    scaling = RopeScaling(
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_position=int(
            parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
        divisors=tuple(parameters.get("divisors", ())),
    )
    return Rope(head_dim=head_dim(config), theta=float(theta), scaling=scaling)
