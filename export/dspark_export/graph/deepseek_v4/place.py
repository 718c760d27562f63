"""Index arithmetic of a step: where tokens are in caches, and what they may see.

Shapes as in ``graph.layout``; besides, T entries of a compression.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.decoder import Rope
from dspark_export.graph.deepseek_v4.rotation import Rotation, rotation
from dspark_export.graph.layout import RaggedInputs
from dspark_export.graph.ort_dialect import OrtDialect
from dspark_export.graph.tape import GraphTape

MASKED = np.finfo(np.float32).min
"""Score of what is not seen."""


@dataclass(frozen=True)
class Entries:
    """The entries of one compression rate."""

    rate: int
    padding: ir.Value
    """int64 [8], for Pad: makes a cache [R, 1, C, W] a whole number of entries long, at least one."""
    ready: ir.Value
    """bool [R, Q, T]: the query's position is at or behind the last one of the entry."""
    rotation: Rotation
    """Of the first position of each entry, [1, T, ...]."""


@dataclass(frozen=True)
class Place:
    """Indices that all layers share."""

    query_index: ir.Value
    """[R, Q]"""
    placement: ir.Value
    """Where new rows go, for the dialect's ``write``."""
    window_bias: ir.Value
    """float32 [R, Q, 1, C]: 0 where the sliding window is, hugely negative elsewhere."""
    output_rows: ir.Value
    """[B]: row of a result viewed as [R * Q, ...] for every token."""
    rotations: dict[Rope, Rotation]
    """Of the tokens, [B, 1, ...]."""
    entries: dict[int, Entries]
    """By rate."""


def place(
    dialect: OrtDialect,
    inputs: RaggedInputs,
    cache: ir.Value,
    window: int,
    tables: Mapping[Rope, tuple[ir.Value, ir.Value]],
    compressed: Rope,
    rates: set[int],
    max_context: int,
) -> Place:
    """Build the indices; ``cache`` is any layer's, read for its length."""
    tape = dialect.tape
    keys = dialect.key_positions(cache)  # [C]

    def of_queries(values: ir.Value) -> ir.Value:
        gathered = tape.op("Gather", values, inputs.query_index, axis=0)
        lifted: ir.Value = tape.op("Unsqueeze", gathered, tape.constant([2]))
        return lifted  # [R, Q, 1]

    horizon = of_queries(inputs.horizon)
    before = tape.op("Sub", of_queries(inputs.window_end), tape.constant(window))
    inside = tape.op("And", tape.op("LessOrEqual", keys, horizon), tape.op("Greater", keys, before))
    query_width = tape.op("Shape", inputs.query_index, start=1, end=2)
    capacity = tape.op("Shape", cache, start=2, end=3)
    entries = {}
    for rate in sorted(rates):
        length = tape.op("Div", tape.op("Add", capacity, tape.constant([rate - 1])), tape.constant([rate]))
        missing = tape.op("Sub", tape.op("Mul", length, tape.constant([rate])), capacity)
        index = tape.range(length)  # [T]
        complete = tape.op("Div", tape.op("Add", horizon, tape.constant(1)), tape.constant(rate))
        # Capacity may go beyond the context; what stands there is never seen.
        first = tape.op("Min", tape.op("Mul", index, tape.constant(rate)), tape.constant(max_context - 1))
        entries[rate] = Entries(
            rate,
            tape.op("Concat", tape.constant([0] * 6), missing, tape.constant([0]), axis=0),
            tape.op("Less", index, complete),
            rotation(tape, tables[compressed], first, (1, -1)),
        )
    return Place(
        query_index=inputs.query_index,
        placement=dialect.placement(inputs.rows, inputs.positions, 1),
        window_bias=tape.op("Unsqueeze", bias(dialect, inside), tape.constant([2])),
        output_rows=tape.op("Add", tape.op("Mul", inputs.rows, query_width), inputs.columns),
        rotations={rope: rotation(tape, table, inputs.positions, (-1, 1)) for rope, table in tables.items()},
        entries=entries,
    )


def bias(dialect: OrtDialect, visible: ir.Value) -> ir.Value:
    """0 where ``visible``, hugely negative elsewhere; float32, same shape."""
    tape = dialect.tape
    hidden = tape.constant(MASKED, np.float32)
    made: ir.Value = tape.op("Where", visible, tape.constant(0.0, np.float32), hidden)
    return made


def rope_tables(tape: GraphTape, ropes: Iterable[Rope], positions: int) -> dict[Rope, tuple[ir.Value, ir.Value]]:
    """Cosines and sines of each rotation as initializers, [positions, rope_dim / 2]; once a graph."""
    tables = {}
    for index, rope in enumerate(dict.fromkeys(ropes)):
        cosines, sines = rope.tables(positions)
        tables[rope] = (tape.table(f"rope_cos.{index}", cosines), tape.table(f"rope_sin.{index}", sines))
    return tables
