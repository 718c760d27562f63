"""Batched products of attention, whose bits depend on neither company nor threads.

The kernel adds the inner dimension in blocks, and how long a block is depends on how many columns a thread got: on the
number of threads, and on how many products there are to share. So an inner dimension is at most one block long, or the
columns are too few to be shared out.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.tape import CONTRIB

_BLOCK = 128
"""The shortest block of the inner dimension."""
_COLUMNS = 16
"""What threads share columns out by."""


def scores(parts: Parts, query: ir.Value, rows: ir.Value, width: int, scale: float) -> ir.Value:
    """[R, Q, heads, width] times [R, 1, n, width]: scaled products of every head and row, [R, Q, heads, n]."""
    tape = parts.tape
    sizes = [min(_BLOCK, width - start) for start in range(0, width, _BLOCK)]
    total, *others = [
        tape.op("FusedMatMul", left, right, domain=CONTRIB, transB=1, alpha=scale)
        for left, right in zip(parts.split(query, sizes), parts.split(rows, sizes), strict=True)
    ]
    for other in others:
        total = tape.op("Add", total, other)
    summed: ir.Value = total
    return summed


def mixture_of_rows(parts: Parts, shares: ir.Value, rows: ir.Value, heads: int, width: int) -> ir.Value:
    """Weights [R, Q, heads, n] of rows [R, 1, n, width]: [R * Q, heads, width]"""
    tape, columns = parts.tape, math.gcd(width, _COLUMNS)
    strips = tape.op("Squeeze", rows, tape.constant([1]))  # [R, n, width]
    strips = tape.op("Transpose", tape.reshape(strips, (0, 0, width // columns, columns)), perm=[0, 2, 1, 3])
    strips = tape.op("Unsqueeze", strips, tape.constant([1]))  # [R, 1, width / columns, n, columns]
    mixed = tape.op("MatMul", tape.op("Unsqueeze", shares, tape.constant([2])), strips)
    mixed = tape.op("Transpose", mixed, perm=[0, 1, 3, 2, 4])
    return tape.reshape(mixed, (-1, heads, width))
