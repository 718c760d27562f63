"""The block that a drafter fills, as tokens and as places in the slot cache. R requests, m slots, S cache rows."""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.drafter_spec import DrafterSpec
from dspark_export.graph.layout import RaggedInputs
from dspark_export.graph.tape import GraphTape

WIDTH = "W"
"""Dimension of a block's slots where a round may have fewer than the block size."""


def block_tokens(tape: GraphTape, spec: DrafterSpec, anchors: ir.Value, width: ir.Value) -> ir.Value:
    """int64 [R * m]: each of ``anchors`` [R] and mask tokens behind it."""
    masks = tape.op(
        "Expand",
        tape.constant([[spec.mask_token_id]]),
        tape.op("Concat", tape.op("Shape", anchors), tape.op("Sub", width, tape.constant([1])), axis=0),
    )
    tokens = tape.op("Concat", tape.op("Unsqueeze", anchors, tape.constant([1])), masks, axis=1)
    return tape.reshape(tokens, (-1,))


def block_inputs(
    tape: GraphTape,
    width: ir.Value,
    block_rows: ir.Value,
    starts: ir.Value,
    query_index: ir.Value,
    causal: bool = False,
) -> RaggedInputs:
    """Slot k of request i is token i * m + k, at position starts[i] + k; it may look up to the block's end, or, where
    ``causal``, to itself. Windows count positions before the anchor: all slots see the same of them.

    ``block_rows`` and ``starts`` [R], ``query_index`` [S, Q]: a stage may bind more columns than the m of a block,
    which no slot reads.
    """
    one = tape.constant([1])
    offsets = tape.op("Unsqueeze", tape.range(width), tape.constant([0]))  # [1, m]
    nothing = tape.op("Mul", offsets, tape.constant(0))
    start = tape.op("Unsqueeze", starts, one)
    row = tape.op("Unsqueeze", block_rows, one)
    positions = tape.reshape(tape.op("Add", start, offsets), (-1,))
    ends = tape.op("Add", start, tape.op("Add", nothing, tape.op("Sub", width, one)))
    before = tape.op("Add", start, tape.op("Sub", nothing, one))
    return RaggedInputs(
        positions=positions,
        rows=tape.reshape(tape.op("Add", row, nothing), (-1,)),
        columns=tape.reshape(tape.op("Add", tape.op("Sub", start, start), offsets), (-1,)),
        query_index=query_index,
        horizon=positions if causal else tape.reshape(ends, (-1,)),
        window_end=tape.reshape(before, (-1,)),
    )
