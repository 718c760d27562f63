"""A decoder layer: attention and experts, each between a collapse of the residual streams and their mixing."""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.graph.deepseek_v4.attention import Caches, Halves, attention
from dspark_export.graph.deepseek_v4.experts import mixture
from dspark_export.graph.deepseek_v4.hyper import collapse, merge
from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.deepseek_v4.place import Place


def decoder_layer(
    parts: Parts,
    layer: int,
    streams: ir.Value,
    input_ids: ir.Value,
    caches: Caches,
    place: Place,
    committed: Halves | None = None,
) -> tuple[ir.Value, Caches]:
    """(the streams [B, streams, H] behind the layer, its caches after new rows were written)

    ``committed``: as for ``attention``.
    """
    name, hidden = f"layers.{layer}", parts.decoder.hidden_size
    collapsed, mixing = collapse(parts, f"{name}.hc_attn", streams)
    normed = parts.norm(collapsed, f"{name}.attn_norm", hidden)
    block, written = attention(parts, layer, normed, caches, place, committed)
    streams = merge(parts, mixing, block, streams)
    collapsed, mixing = collapse(parts, f"{name}.hc_ffn", streams)
    normed = parts.norm(collapsed, f"{name}.ffn_norm", hidden)
    return merge(parts, mixing, mixture(parts, layer, normed, input_ids), streams), written
