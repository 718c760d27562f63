"""Which tensors a checkpoint's layers consist of, a target's as a drafter's, and which of its tensors nothing reads."""

from __future__ import annotations

from collections.abc import Collection

from dspark_export.decoder import Decoder
from dspark_export.weights import WeightSource

_TABLE = ".rotary_emb.inv_freq"
"""End of a buffer in old checkpoints, which follows from the config."""


def layer_shapes(decoder: Decoder, layer: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a layer in the layout of Llama, with its shape; names begin with ``prefix``."""
    attention, hidden, inner = decoder.layer_attention(layer), decoder.hidden_size, decoder.intermediate_size
    dim = attention.head_dim
    queries, keys = attention.num_heads * dim, attention.num_kv_heads * dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if decoder.branch_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{norm}.weight": (hidden,) for norm in norms}
    if attention.qk_norm:
        shapes |= {f"{prefix}.self_attn.{kind}_norm.weight": (dim,) for kind in "qk"}
    if decoder.layer_scalar:
        shapes[f"{prefix}.layer_scalar"] = (1,)
    products = [
        ("self_attn.q_proj", queries, hidden, attention.qkv_bias),
        ("self_attn.k_proj", keys, hidden, attention.qkv_bias),
        ("self_attn.v_proj", keys, hidden, attention.qkv_bias),
        ("self_attn.o_proj", hidden, queries, attention.output_bias),
        ("mlp.gate_proj", inner, hidden, decoder.mlp_bias),
        ("mlp.up_proj", inner, hidden, decoder.mlp_bias),
        ("mlp.down_proj", hidden, inner, decoder.mlp_bias),
    ]
    for part, width, reads, bias in products:
        if part == "self_attn.v_proj" and attention.keys_are_values:
            continue
        shapes[f"{prefix}.{part}.weight"] = (width, reads)
        if bias:
            shapes[f"{prefix}.{part}.bias"] = (width,)
    return shapes


def unread(weights: WeightSource, known: Collection[str], beginnings: tuple[str, ...]) -> str:
    """The tensors beyond the ``known`` ones whose names begin so, for a message: the first and how many more; empty
    where there are none."""
    found = sorted(
        tensor
        for tensor in weights.names() - {*known}
        if tensor.startswith(beginnings) and not tensor.endswith(_TABLE)
    )  # fmt: skip
    return found[0] + (f" and {len(found) - 1} more" if found[1:] else "") if found else ""
