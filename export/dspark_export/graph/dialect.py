"""What the two dialects of a graph differ in. A description of a model is built on one of them, and never asks which.

:class:`~dspark_export.graph.ort_dialect.OrtDialect` uses ONNX Runtime's fused operators and scatters into the cache;
:class:`~dspark_export.graph.standard_dialect.StandardDialect` uses operators of the ONNX standard alone, strongly
typed, as TensorRT wants them. Products with weights are apart from both (``linear`` and ``standard_linear``).
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from dspark_export.decoder import Attention
from dspark_export.graph.tape import GraphTape


class Dialect(Protocol):
    """Leaf operations. Shapes as in ``layout``; values are in ``tape.compute`` unless said otherwise."""

    @property
    def tape(self) -> GraphTape:
        """Where nodes go."""

    @property
    def cache_length(self) -> str | int:
        """The dimension C of a cache [R, Hkv, C, D]."""

    @property
    def inputs(self) -> list[ir.Value]:
        """Graph inputs that this dialect needs beside those of the model."""

    def shared(self, name: str, shape: tuple[int, int]) -> ir.Value:
        """A matrix that verifier and drafter have in common, provided by whoever loads the graph."""

    def norm(self, value: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        """RMS norm over the last dimension, statistics in float32."""

    def add_and_norm(
        self, value: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """(norm(value + residual), value + residual)"""

    def rotate(
        self, value: ir.Value, width: int, position_ids: ir.Value, rotation: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """Rotary embedding of heads side by side, [B, 1, width], every token a sequence of its own.

        ``position_ids`` is [B, 1].
        """

    def silu(self, value: ir.Value) -> ir.Value:
        """x * sigmoid(x)"""

    def gelu_tanh(self, value: ir.Value) -> ir.Value:
        """GELU by its approximation with tanh."""

    def key_positions(self, cache: ir.Value) -> ir.Value:
        """int64 [C]: positions that attention looks at; ``cache`` is any layer's."""

    def mask(self, visible: ir.Value, group: int) -> ir.Value:
        """What ``attend`` takes, made of bool [R, Q, C], for ``group`` query heads a key head."""

    def placement(self, rows: ir.Value, positions: ir.Value, kv_heads: int) -> ir.Value:
        """Where new rows of these cache rows and positions (int64 [B] each) go in a cache."""

    def join(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """The placement of the rows of two others."""

    def write(self, cache: ir.Value, placement: ir.Value, rows: ir.Value) -> ir.Value:
        """The cache [R, Hkv, C, D] with rows [B, Hkv, D] in it; the same memory where caller and runtime agree."""

    def attend(
        self, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value, attention: Attention
    ) -> ir.Value:
        """Attention of [R, Hkv, G*Q, D] over caches [R, Hkv, C, D]; heads and rows in the query's order."""
