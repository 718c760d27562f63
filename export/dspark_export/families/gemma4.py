"""Gemma 4, text, dense: global layers of other heads than the sliding ones, whose values may be their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Attention, Decoder
from dspark_export.families.common import FULL, SLIDING, layer_types, require, rope, rope_by_layer, window
from dspark_export.families.gemma import gemma_decoder

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
}
"""Released configs may leave out what equals these."""
_UNIFIED_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
_GLOBAL_HEAD_DIM = 512
_ROPES: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def describe(config: Mapping[str, Any]) -> Decoder:
    """Decoder of a ``gemma4_text`` or ``gemma4_unified_text`` config.

    Raises:
        ValueError: a value that the graph cannot reproduce.
    """
    unified = "unified" in str(config["model_type"])
    config = {**_DEFAULTS, **(_UNIFIED_DEFAULTS if unified else {}), **config}
    require(config, "hidden_activation", "gelu_pytorch_tanh", missing="gelu_pytorch_tanh")
    require(config, "hidden_size_per_layer_input", 0)
    require(config, "num_kv_shared_layers", 0)
    require(config, "enable_moe_block", False)
    require(config, "use_double_wide_mlp", False)
    # "vision" lets the tokens of an image see each other; text stays causal.
    if config.get("use_bidirectional_attention") != "vision":
        require(config, "use_bidirectional_attention", None)
    kinds = list(layer_types(config, 6))
    kinds[-1:] = [FULL]  # as transformers does, whatever the config says
    attentions = tuple(_attention(config, layer, kind) for layer, kind in enumerate(kinds))
    return gemma_decoder(config, "gemma4", attentions, layer_scalar=True)


def _attention(config: Mapping[str, Any], layer: int, kind: str) -> Attention:
    keys_are_values = bool(config.get("attention_k_eq_v")) and kind == FULL
    kv_heads, dim = _heads(config, layer, kind)
    bias = bool(config.get("attention_bias", False))
    parameters = rope_by_layer(config).get(kind) or _ROPES[kind]
    return Attention(
        num_heads=config["num_attention_heads"],
        num_kv_heads=kv_heads,
        head_dim=dim,
        rope=rope(parameters, dim, config["max_position_embeddings"], ("default", "linear", "proportional")),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        value_norm=True,
        keys_are_values=keys_are_values,
        window=window(config, kind),
        fixed_scale=1.0,
    )


def _heads(config: Mapping[str, Any], layer: int, kind: str) -> tuple[int, int]:
    """Key/value heads and channels a head, in the new spelling (per_layer_config) or the old one (global_*)."""
    kv_heads, dim = config["num_key_value_heads"], config["head_dim"]
    by_layer = config.get("per_layer_config")
    if by_layer is not None:
        # Keys may be padded with zeros ("05"), or numbers where the config comes from code.
        own: Mapping[str, Any] = next((said for key, said in by_layer.items() if int(key) == layer), {})
        return own.get("num_key_value_heads") or kv_heads, own.get("head_dim") or dim
    if kind == SLIDING:
        return kv_heads, dim
    if config.get("attention_k_eq_v"):
        kv_heads = config.get("num_global_key_value_heads") or kv_heads
    return kv_heads, config.get("global_head_dim") or _GLOBAL_HEAD_DIM
