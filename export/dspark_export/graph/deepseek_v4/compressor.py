"""Compressed entries of a layer, computed anew in every step from the cached rows of their positions.

An entry is never cached: a rejected draft is overwritten like any row, and the entry follows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.deepseek_v4 import Compression
from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.deepseek_v4.place import Entries
from dspark_export.graph.deepseek_v4.rotation import rotate


def compress(
    parts: Parts, name: str, compression: Compression, width: int, vectors: ir.Value, gates: ir.Value, entries: Entries
) -> ir.Value:
    """Entries [R, T, width] of cached ``vectors`` and ``gates`` [R, 1, C, series * width].

    ``name``: such as layers.2.attn.compressor. An entry is a mean of vectors with weights softmax(gates) in each
    channel. Of two series the first goes into the next entry, the second into the entry of its own position.
    """
    tape, rate, series = parts.tape, compression.rate, compression.series
    positions = parts.exact(f"{name}.ape", (rate, series * width))
    vectors = _windows(parts, vectors, rate, series * width, entries)
    gates = tape.op("Add", _windows(parts, gates, rate, series * width, entries), positions)
    if series == 2:
        vectors = _with_earlier(parts, vectors, width, 0.0)
        # Nothing stands before the first entry.
        gates = _with_earlier(parts, gates, width, -np.inf)
    weights = tape.op("Softmax", gates, axis=2)
    # A product with ones: a reduction is shared out among threads by how many entries there are.
    summed = tape.op("MatMul", parts.ones(1, 1, 1, series * rate), tape.op("Mul", vectors, weights))
    mean = tape.op("Squeeze", summed, tape.constant([2]))
    return rotate(parts, parts.norm(mean, f"{name}.norm", width), width, entries.rotation)


def _windows(parts: Parts, rows: ir.Value, rate: int, width: int, entries: Entries) -> ir.Value:
    """[R, 1, C, width] -> [R, T, rate, width], zeros at the end where C is not a whole number of entries."""
    padded = parts.tape.op("Pad", rows, entries.padding)
    return parts.tape.reshape(padded, (0, -1, rate, width))


def _with_earlier(parts: Parts, windows: ir.Value, width: int, fill: float) -> ir.Value:
    """[R, T, rate, 2 * width] -> [R, T, 2 * rate, width]: the first series of the entry before, then the second."""
    tape = parts.tape
    first, second = parts.split(windows, [width, width])
    shifts = tape.constant([0, 1, 0, 0, 0, -1, 0, 0])
    earlier = tape.op("Pad", first, shifts, tape.constant(fill, np.float32))
    joined: ir.Value = tape.op("Concat", earlier, second, axis=2)
    return joined
