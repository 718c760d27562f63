"""Gemma 3, text: sliding windows between global layers, four norms a layer, q and k norms, tied embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Attention, Decoder, Rope
from dspark_export.families.common import FULL, SLIDING, layer_types, require, rope, rope_by_layer, window
from dspark_export.families.gemma import gemma_decoder

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
"""Released configs leave out what equals these."""
_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_OLD_THETA = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}


def describe(config: Mapping[str, Any]) -> Decoder:
    """Decoder of a ``gemma3_text`` config.

    Raises:
        ValueError: a value that the graph cannot reproduce.
    """
    config = {**_DEFAULTS, **config}
    require(config, "hidden_activation", "gelu_pytorch_tanh", missing="gelu_pytorch_tanh")
    require(config, "use_bidirectional_attention", False)
    # transformers reads the key and does not apply it, so that there is nothing to agree with.
    require(config, "attn_logit_softcapping", None)
    pattern = config.get("_sliding_window_pattern") or config.get("sliding_window_pattern") or 6
    attentions = tuple(_attention(config, kind) for kind in layer_types(config, pattern))
    return gemma_decoder(config, "gemma3", attentions, norm_offset=True)


def _attention(config: Mapping[str, Any], kind: str) -> Attention:
    bias = bool(config.get("attention_bias", False))
    return Attention(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rope=_rope(config, kind),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        window=window(config, kind),
        fixed_scale=float(config["query_pre_attn_scalar"] ** -0.5),
    )


def _rope(config: Mapping[str, Any], kind: str) -> Rope:
    """New configs state rope_parameters by layer type; old ones two thetas, and a rope_scaling of global layers."""
    parameters = dict(rope_by_layer(config).get(kind) or {})
    if kind == FULL:
        parameters |= config.get("rope_scaling") or {}
    parameters.setdefault("rope_theta", config.get(_OLD_THETA[kind]) or _THETA[kind])
    return rope(parameters, config["head_dim"], config["max_position_embeddings"], ("default", "linear", "llama3"))
