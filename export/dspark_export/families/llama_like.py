"""Models with the layout of Llama: Llama 2 and 3.x, SmolLM2 and others of model_type llama, and dense Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Attention, Decoder
from dspark_export.families.common import FULL, head_dim, read_rope, require


def describe(config: Mapping[str, Any]) -> Decoder:
    """Decoder of a ``LlamaForCausalLM`` or ``Qwen3ForCausalLM`` config.

    Raises:
        ValueError: a value that the graph cannot reproduce.
    """
    family = str(config["model_type"])
    require(config, "hidden_act", "silu", missing="silu")
    require(config, "use_sliding_window", False, missing=False)
    # Where the one key denies windows and the other wants them, transformers refuses to run.
    if any(kind != FULL for kind in config.get("layer_types") or ()):
        raise ValueError(f"layer_types: expected {FULL} in every layer; models with sliding windows are not supported")
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] if family == "qwen3" else config.get("num_key_value_heads") or heads
    bias = bool(config.get("attention_bias", False))
    return Decoder(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        norm_eps=config["rms_norm_eps"],
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim(config),
            rope=read_rope(config),
            qk_norm=family == "qwen3",
            qkv_bias=bias,
            output_bias=bias,
        ),
        tied_embedding=bool(config.get("tie_word_embeddings", False)),
        max_position=config["max_position_embeddings"],
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
