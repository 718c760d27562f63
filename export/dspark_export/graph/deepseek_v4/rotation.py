"""Rotary embedding of the last channels of a head, whose neighbours are the pairs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.tape import GraphTape


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of some positions, float32 [..., rope_dim / 2, 1]."""

    cosines: ir.Value
    sines: ir.Value


def rotation(
    tape: GraphTape, tables: tuple[ir.Value, ir.Value], positions: ir.Value, shape: tuple[int, int]
) -> Rotation:
    """Rows of two tables [P, rope_dim / 2] at int64 ``positions`` [n], as [*shape, rope_dim / 2, 1]."""

    def rows(table: ir.Value) -> ir.Value:
        gathered = tape.op("Gather", table, positions, axis=0)
        width = tape.op("Shape", table, start=1, end=2)
        full = tape.op("Concat", tape.constant(shape), width, tape.constant([1]), axis=0)
        shaped: ir.Value = tape.op("Reshape", gathered, full)
        return shaped

    return Rotation(rows(tables[0]), rows(tables[1]))


def rotate(parts: Parts, value: ir.Value, width: int, turn: Rotation, back: bool = False) -> ir.Value:
    """Heads [n, m, width] with their last channels rotated, or rotated ``back``."""
    tape, rotated = parts.tape, parts.decoder.rope_dim
    *kept, tail = parts.split(value, [width - rotated, rotated] if width > rotated else [rotated])
    pairs = tape.reshape(tail, (0, 0, rotated // 2, 2))
    even, odd = parts.split(pairs, [1, 1])
    left, right = ("Add", "Sub") if back else ("Sub", "Add")
    first = tape.op(left, tape.op("Mul", even, turn.cosines), tape.op("Mul", odd, turn.sines))
    second = tape.op(right, tape.op("Mul", odd, turn.cosines), tape.op("Mul", even, turn.sines))
    turned = tape.reshape(tape.op("Concat", first, second, axis=-1), (0, 0, rotated))
    if not kept:
        return turned
    joined: ir.Value = tape.op("Concat", *kept, turned, axis=-1)
    return joined
