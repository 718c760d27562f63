"""Index arithmetic of the ragged batch: computed once a step, read by every layer.

Notation of the shapes: B tokens in all, R cache rows in view, Q most tokens of one request, N rows that want logits,
Hq query heads, Hkv key/value heads, G = Hq / Hkv, D channels a head, C capacity of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.decoder import Attention
from dspark_export.graph.dialect import Dialect


@dataclass(frozen=True)
class RaggedInputs:
    """Values that place every token of a step. All int64.

    ``positions`` [B]: position in its sequence. ``rows`` [B]: cache row within the bound view. ``columns`` [B]: which
    of its request's tokens it is in this step. ``query_index`` [R, Q]: the token of each (row, column), any token
    where there is none. ``horizon`` [B]: last position that a token may attend to. ``window_end`` [B]: the last of the
    positions that a sliding window counts; those behind it, up to the horizon, are seen besides.
    """

    positions: ir.Value
    rows: ir.Value
    columns: ir.Value
    query_index: ir.Value
    horizon: ir.Value
    window_end: ir.Value


@dataclass(frozen=True)
class RaggedLayout:
    """Indices shared by all layers."""

    position_ids: ir.Value
    """[B, 1]"""
    query_rows: ir.Value
    """[R, Hkv, G*Q]: row of ``qk`` viewed as [B * (Hq + Hkv), D] for every query."""
    key_rows: ir.Value
    """[B, Hkv]: row of the same view for every new key."""
    placement: ir.Value
    """Where new keys and values go in a cache, as the dialect writes them."""
    output_rows: ir.Value
    """[B, Hq]: row of the attention output viewed as [R * Hkv * G*Q, D] for every token and head."""
    mask: ir.Value
    """Where queries may look, as the dialect's attention takes it."""


def ragged_layout(dialect: Dialect, inputs: RaggedInputs, attention: Attention, cache: ir.Value) -> RaggedLayout:
    """Build the indices of layers with this ``attention``.

    ``cache`` is any such layer's key cache [R, Hkv, C, D], read for its shape alone.
    """
    tape = dialect.tape
    heads, kv_heads, group = attention.num_heads, attention.num_kv_heads, attention.group
    width = heads + kv_heads
    query_width = tape.op("Shape", inputs.query_index, start=1, end=2)  # [1] = Q

    # query_rows[r, h, g*Q + j] = query_index[r, j] * width + h*G + g
    head_of = tape.constant(np.arange(heads).reshape(1, kv_heads, group, 1))
    first = tape.op("Unsqueeze", tape.op("Mul", inputs.query_index, tape.constant(width)), tape.constant([1, 2]))
    query_rows = tape.reshape(tape.op("Add", first, head_of), (0, kv_heads, -1))

    token = tape.range(tape.op("Shape", inputs.positions))
    key_base = tape.op("Unsqueeze", tape.op("Mul", token, tape.constant(width)), tape.constant([1]))
    key_rows = tape.op("Add", key_base, tape.constant(np.arange(heads, width).reshape(1, kv_heads)))

    # output_rows[b, h] = (row[b] * Hq + h) * Q + column[b]
    first_head = tape.op("Unsqueeze", tape.op("Mul", inputs.rows, tape.constant(heads)), tape.constant([1]))
    row_heads = tape.op("Add", first_head, tape.constant(np.arange(heads)))
    column = tape.op("Unsqueeze", inputs.columns, tape.constant([1]))
    output_rows = tape.op("Add", tape.op("Mul", row_heads, query_width), column)

    key_position = dialect.key_positions(cache)  # [C]
    horizon = tape.op("Gather", inputs.horizon, inputs.query_index, axis=0)  # [R, Q]
    visible = tape.op("LessOrEqual", key_position, tape.op("Unsqueeze", horizon, tape.constant([2])))  # [R, Q, C]
    if attention.window is not None:
        window_end = tape.op("Gather", inputs.window_end, inputs.query_index, axis=0)
        last_hidden = tape.op("Sub", window_end, tape.constant(attention.window))
        inside = tape.op("Greater", key_position, tape.op("Unsqueeze", last_hidden, tape.constant([2])))
        visible = tape.op("And", visible, inside)
    mask = dialect.mask(visible, group)

    return RaggedLayout(
        position_ids=tape.op("Unsqueeze", inputs.positions, tape.constant([1])),
        query_rows=query_rows,
        key_rows=key_rows,
        placement=dialect.placement(inputs.rows, inputs.positions, kv_heads),
        output_rows=output_rows,
        mask=mask,
    )
