"""Qwen3, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Attention, Decoder
from dspark_export.families.common import head_dim, read_rope, require_silu


def describe(config: Mapping[str, Any]) -> Decoder:
    """Decoder of a ``Qwen3ForCausalLM`` config."""
    require_silu(config)
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window: expected false, got true; Qwen3 with sliding windows is not supported")
    bias = bool(config.get("attention_bias", False))
    return Decoder(
        family="qwen3",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        norm_eps=config["rms_norm_eps"],
        attention=Attention(
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=head_dim(config),
            rope=read_rope(config),
            qk_norm=True,
            qkv_bias=bias,
            output_bias=bias,
        ),
        tied_embedding=bool(config.get("tie_word_embeddings", False)),
        max_position=config["max_position_embeddings"],
    )
