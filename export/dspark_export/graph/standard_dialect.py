"""The dialect for TensorRT: operators of the ONNX standard alone, strongly typed in one compute dtype.

**Cache.** TensorScatter (opset 24) becomes TensorRT's KV cache update layer, which writes in place where the cache's
input and output are bound to one address; ScatterND would copy the cache. It writes a block [W, Hkv, D] to every cache
row in view from a position of its own, so that ragged rows are gathered into [R, W] first (``update_index``); products
with weights still run on ragged rows. What is written beyond a request's own rows is overwritten before anybody sees
it. The layer wants a cache of a static length; how far attention looks is the length of ``key_positions``.

**Attention.** The standard's Attention operator maps to TensorRT's fused attention, which keeps the scores on the chip;
but TensorRT refuses it for heads wider than 256 (no kernel; the parser cannot mark it decomposable), with a soft cap,
and takes no softmax precision. Heads it refuses get plain products with the softmax in float32. NonZero and Attention
with past and present outputs do not parse at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from dspark_export.decoder import Attention
from dspark_export.graph.tape import GraphTape, graph_input

STANDARD_OPSET = 24
WIDEST_FUSED_HEAD = 256


@dataclass(frozen=True)
class StandardDialect:
    """Implements :class:`~dspark_export.graph.dialect.Dialect`; names of its inputs as in ``engine_contract``."""

    tape: GraphTape
    cache_length: str | int
    update_index: ir.Value
    """int64 [R, W]: which of the new rows go to each cache row."""
    write_starts: ir.Value = field(default_factory=lambda: graph_input("write_starts", ir.DataType.INT64, ("R",)))
    """Position of the first of them."""
    _key_positions: ir.Value = field(default_factory=lambda: graph_input("key_positions", ir.DataType.INT64, ("C",)))
    _shared: dict[str, ir.Value] = field(default_factory=dict)
    _used: list[ir.Value] = field(default_factory=list)
    _view: list[ir.Value] = field(default_factory=list)
    """End of the view [1], made once."""

    @property
    def inputs(self) -> list[ir.Value]:
        return [self.write_starts, *self._used, *self._shared.values()]

    def shared(self, name: str, shape: tuple[int, int]) -> ir.Value:
        if name not in self._shared:
            self._shared[name] = graph_input(name, self.tape.compute, shape)
        return self._shared[name]

    def norm(self, value: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        normed: ir.Value = self.tape.op("RMSNormalization", value, weight, axis=-1, epsilon=epsilon, stash_type=1)
        return normed

    def add_and_norm(
        self, value: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        total = self.tape.op("Add", value, residual)
        return self.norm(total, weight, epsilon), total

    def rotate(
        self, value: ir.Value, width: int, position_ids: ir.Value, rotation: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        table = rotation[0].shape
        assert table is not None
        heads = width // (2 * table.numpy()[1])
        rotated: ir.Value = self.tape.op("RotaryEmbedding", value, *rotation, position_ids, num_heads=heads)
        return rotated

    def silu(self, value: ir.Value) -> ir.Value:
        activated: ir.Value = self.tape.op("Mul", value, self.tape.op("Sigmoid", value))
        return activated

    def gelu_tanh(self, value: ir.Value) -> ir.Value:
        activated: ir.Value = self.tape.op("Gelu", value, approximate="tanh")
        return activated

    def key_positions(self, cache: ir.Value) -> ir.Value:
        if not self._used:
            self._used.append(self._key_positions)
        return self._key_positions

    def mask(self, visible: ir.Value, group: int) -> ir.Value:
        """bool [R, 1, Q, C]"""
        masked: ir.Value = self.tape.op("Unsqueeze", visible, self.tape.constant([1]))
        return masked

    def placement(self, rows: ir.Value, positions: ir.Value, kv_heads: int) -> ir.Value:
        return self.update_index

    def join(self, first: ir.Value, second: ir.Value) -> ir.Value:
        return self.update_index

    def write(self, cache: ir.Value, placement: ir.Value, rows: ir.Value) -> ir.Value:
        tape = self.tape
        update = tape.op("Transpose", tape.op("Gather", rows, placement, axis=0), perm=[0, 2, 1, 3])
        written: ir.Value = tape.op("TensorScatter", cache, update, self.write_starts, axis=2, mode="linear")
        return written

    def attend(
        self, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value, attention: Attention
    ) -> ir.Value:
        tape, dim, group = self.tape, attention.head_dim, attention.group
        keys, values = self._in_view(keys), self._in_view(values)
        if dim <= WIDEST_FUSED_HEAD:
            heads = tape.reshape(query, (0, attention.num_heads, -1, dim))
            fused: ir.Value = tape.op("Attention", heads, keys, values, mask, scale=attention.scale)
            return fused
        if group > 1:
            mask = tape.op("Concat", *[mask] * group, axis=2)
        scores = tape.to_float(tape.op("MatMul", query, tape.op("Transpose", keys, perm=[0, 1, 3, 2])))
        if attention.scale != 1.0:
            scores = tape.op("Mul", scores, tape.constant(attention.scale, np.float32))
        scores = tape.op("Where", mask, scores, tape.constant(np.finfo(np.float32).min, np.float32))
        mixed: ir.Value = tape.op("MatMul", tape.to_compute(tape.op("Softmax", scores, axis=-1)), values)
        return mixed

    def _in_view(self, cache: ir.Value) -> ir.Value:
        tape = self.tape
        if not self._view:
            self._view.append(tape.op("Shape", self._key_positions))
        sliced: ir.Value = tape.op("Slice", cache, tape.constant([0]), self._view[0], tape.constant([2]))
        return sliced
