"""Llama and models with its layout (SmolLM2 among them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Attention, Decoder
from dspark_export.families.common import head_dim, read_rope, require_silu


def describe(config: Mapping[str, Any]) -> Decoder:
    """Decoder of a ``LlamaForCausalLM`` config."""
    require_silu(config)
    bias = bool(config.get("attention_bias", False))
    return Decoder(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        norm_eps=config["rms_norm_eps"],
        attention=Attention(
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=head_dim(config),
            rope=read_rope(config),
            qkv_bias=bias,
            output_bias=bias,
        ),
        tied_embedding=bool(config.get("tie_word_embeddings", False)),
        max_position=config["max_position_embeddings"],
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
