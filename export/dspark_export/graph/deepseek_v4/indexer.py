"""Which compressed entries a token attends to: the best few by a small attention of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.deepseek_v4 import Indexer
from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.deepseek_v4.place import Entries, Place, bias
from dspark_export.graph.deepseek_v4.products import scores
from dspark_export.graph.deepseek_v4.rotation import Rotation, rotate


def chosen_bias(
    parts: Parts,
    name: str,
    indexer: Indexer,
    query_residual: ir.Value,
    head_weights: ir.Value,
    keys: ir.Value,
    turn: Rotation,
    entries: Entries,
    place: Place,
) -> ir.Value:
    """float32 [R, Q, T]: 0 at the entries that a query attends to, hugely negative elsewhere.

    ``name``: such as layers.2.attn.indexer. ``query_residual`` [B, query_rank]; ``head_weights`` [B, heads]; ``keys``
    [R, T, head_dim]. Of entries with the same score, the earliest is taken: scores of exactly 0 are common, since a
    score is a sum of rectified products.
    """
    tape, heads, dim = parts.tape, indexer.heads, indexer.head_dim
    query = parts.product(query_residual, (f"{name}.wq_b",), parts.decoder.query_rank)
    query = rotate(parts, tape.reshape(query, (-1, heads, dim)), dim, turn)
    query = tape.op("Gather", query, place.query_index, axis=0)  # [R, Q, heads, dim]
    keys = tape.op("Unsqueeze", keys, tape.constant([1]))
    products = tape.op("Relu", scores(parts, query, keys, dim, dim**-0.5))
    weights = tape.op("Gather", head_weights, place.query_index, axis=0)
    weights = tape.op("Mul", tape.op("Unsqueeze", weights, tape.constant([2])), tape.number(heads**-0.5))
    ranked = tape.op("Squeeze", tape.op("MatMul", weights, products), tape.constant([2]))  # [R, Q, T]
    ranked = tape.op("Where", entries.ready, ranked, tape.constant(-np.inf, np.float32))
    length = tape.op("Shape", ranked, start=2, end=3)
    best = tape.op("Min", length, tape.constant([indexer.top_k]))
    _, index = tape.op("TopK", ranked, best, outputs=2, axis=-1)
    nothing = tape.op("Expand", tape.constant(False, np.bool_), tape.op("Shape", ranked))
    shape = tape.op("Shape", index)
    chosen = tape.op("ScatterElements", nothing, index, tape.op("Expand", tape.constant(True, np.bool_), shape), axis=2)
    # Where fewer entries are ready than may be chosen, others filled the places.
    return bias(parts.dialect, tape.op("And", chosen, entries.ready))
