"""The block that a drafter fills, as tokens and as places in the slot cache. R requests, g block size, S cache rows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.drafter_spec import DrafterSpec
from dspark_export.graph.layout import RaggedInputs
from dspark_export.graph.tape import GraphTape


def block_tokens(tape: GraphTape, spec: DrafterSpec, anchors: ir.Value) -> ir.Value:
    """int64 [R * g]: each of ``anchors`` [R] and mask tokens behind it."""
    masks = tape.op(
        "Expand",
        tape.constant([[spec.mask_token_id] * (spec.block_size - 1)]),
        tape.op("Concat", tape.op("Shape", anchors), tape.constant([1]), axis=0),
    )
    tokens = tape.op("Concat", tape.op("Unsqueeze", anchors, tape.constant([1])), masks, axis=1)
    return tape.reshape(tokens, (-1,))


def block_inputs(
    tape: GraphTape,
    block: int,
    block_rows: ir.Value,
    starts: ir.Value,
    query_index: ir.Value,
    causal: bool = False,
) -> RaggedInputs:
    """Slot k of request i is token i * g + k, at position starts[i] + k; it may look up to the block's end, or, where
    ``causal``, to itself. Windows count positions before the anchor: all slots see the same of them.

    ``block_rows`` and ``starts`` [R], ``query_index`` [S, g].
    """
    offsets = tape.constant(np.arange(block).reshape(1, block))
    start = tape.op("Unsqueeze", starts, tape.constant([1]))
    row = tape.op("Unsqueeze", block_rows, tape.constant([1]))
    positions = tape.reshape(tape.op("Add", start, offsets), (-1,))
    ends = tape.op("Add", start, tape.constant(np.full((1, block), block - 1)))
    before = tape.op("Add", start, tape.constant(np.full((1, block), -1)))
    return RaggedInputs(
        positions=positions,
        rows=tape.reshape(tape.op("Add", row, tape.constant(np.zeros((1, block)))), (-1,)),
        columns=tape.reshape(tape.op("Add", tape.op("Sub", start, start), offsets), (-1,)),
        query_index=query_index,
        horizon=positions if causal else tape.reshape(ends, (-1,)),
        window_end=tape.reshape(before, (-1,)),
    )
