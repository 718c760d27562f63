"""ONNX Runtime's dialect: float32, fused operators of its own, caches of any length that ScatterND updates in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.decoder import Attention
from dspark_export.graph.tape import CONTRIB, GraphTape

_MASKED = np.finfo(np.float32).min


@dataclass(frozen=True)
class OrtDialect:
    """Implements :class:`~dspark_export.graph.dialect.Dialect`."""

    tape: GraphTape
    cache_length: str | int = "C"

    @property
    def inputs(self) -> list[ir.Value]:
        return []

    def shared(self, name: str, shape: tuple[int, int]) -> ir.Value:
        return self.tape.shared(name, shape)

    def norm(self, value: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        normed: ir.Value = self.tape.op("SimplifiedLayerNormalization", value, weight, axis=-1, epsilon=epsilon)
        return normed

    def add_and_norm(
        self, value: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        normed, _, _, total = self.tape.op(
            "SkipSimplifiedLayerNormalization",
            value, residual, weight,
            domain=CONTRIB, outputs=4, epsilon=epsilon,
        )  # fmt: skip
        return normed, total

    def rotate(
        self, value: ir.Value, width: int, position_ids: ir.Value, rotation: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        # Every token is a sequence of its own: the operator refuses sequences longer than its tables, and a step may
        # hold more tokens than the context.
        rotated: ir.Value = self.tape.op("RotaryEmbedding", value, position_ids, *rotation, domain=CONTRIB)
        return rotated

    def silu(self, value: ir.Value) -> ir.Value:
        activated: ir.Value = self.tape.op("QuickGelu", value, domain=CONTRIB, alpha=1.0)
        return activated

    def gelu_tanh(self, value: ir.Value) -> ir.Value:
        activated: ir.Value = self.tape.op("Gelu", value, approximate="tanh")
        return activated

    def key_positions(self, cache: ir.Value) -> ir.Value:
        return self.tape.range(self.tape.op("Shape", cache, start=2, end=3))

    def mask(self, visible: ir.Value, group: int) -> ir.Value:
        """float32 [R, 1, G*Q, C]: 0 where a query may look, hugely negative where it may not."""
        tape = self.tape
        bias = tape.op("Where", visible, tape.constant(0.0, np.float32), tape.constant(_MASKED, np.float32))
        bias = tape.op("Unsqueeze", bias, tape.constant([1]))  # [R, 1, Q, C]
        if group > 1:
            bias = tape.op("Concat", *[bias] * group, axis=2)
        masked: ir.Value = bias
        return masked

    def placement(self, rows: ir.Value, positions: ir.Value, kv_heads: int) -> ir.Value:
        """int64 [B, Hkv, 3]: (row, head, position) of every token and key head, for ScatterND."""
        tape = self.tape
        shape = tape.op("Concat", tape.op("Shape", positions), tape.constant([kv_heads, 1]), axis=0)
        row = tape.op("Expand", tape.op("Unsqueeze", rows, tape.constant([1, 2])), shape)
        head = tape.op("Expand", tape.constant(np.arange(kv_heads).reshape(1, kv_heads, 1)), shape)
        position = tape.op("Expand", tape.op("Unsqueeze", positions, tape.constant([1, 2])), shape)
        index: ir.Value = tape.op("Concat", row, head, position, axis=2)
        return index

    def join(self, first: ir.Value, second: ir.Value) -> ir.Value:
        joined: ir.Value = self.tape.op("Concat", first, second, axis=0)
        return joined

    def write(self, cache: ir.Value, placement: ir.Value, rows: ir.Value) -> ir.Value:
        written: ir.Value = self.tape.op("ScatterND", cache, placement, rows)
        return written

    def attend(
        self, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value, attention: Attention
    ) -> ir.Value:
        tape = self.tape
        scores = tape.op("FusedMatMul", query, keys, domain=CONTRIB, transB=1, alpha=attention.scale)
        weights = tape.op("Softmax", tape.op("Add", scores, mask), axis=-1)
        mixed: ir.Value = tape.op("MatMul", weights, values)
        return mixed
