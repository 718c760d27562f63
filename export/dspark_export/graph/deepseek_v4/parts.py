"""What all parts of the graph use: weights as float32 or as stored, norms, products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dspark_export.deepseek_v4 import DeepSeekV4
from dspark_export.errors import ExportError
from dspark_export.graph.linear import FloatLinears
from dspark_export.graph.ort_dialect import OrtDialect
from dspark_export.graph.tape import GraphTape
from dspark_export.weights import WeightSource


@dataclass(frozen=True)
class Parts:
    """Builds on one tape, with the weights of one checkpoint."""

    dialect: OrtDialect
    decoder: DeepSeekV4
    weights: WeightSource
    """Under the names of released checkpoints."""

    @property
    def tape(self) -> GraphTape:
        return self.dialect.tape

    def exact(
        self, name: str, shape: Sequence[int], change: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray
    ) -> ir.Value:
        """A tensor that stays float32 in every storage, as checkpoints keep it; ``change`` gives it ``shape``."""
        return self._stored(name, shape, ir.DataType.FLOAT, change)

    def integers(self, name: str, shape: Sequence[int]) -> ir.Value:
        """A table of indices, int64."""
        return self._stored(name, shape, ir.DataType.INT64, np.asarray)

    def product(self, value: ir.Value, names: Sequence[str], inner: int) -> ir.Value:
        """Projections side by side: [B, inner] -> [B, sum of widths]."""
        return FloatLinears(self.tape, self.weights).apply(value, tuple(names), inner, bias=False)

    def norm(self, value: ir.Value, name: str, width: int) -> ir.Value:
        """RMS norm over the last dimension, with the weight of this name."""
        return self.dialect.norm(value, self.exact(f"{name}.weight", (width,)), self.decoder.norm_eps)

    def unit_norm(self, value: ir.Value, width: int) -> ir.Value:
        """RMS norm over the last dimension, without weight."""
        return self.dialect.norm(value, self.ones(width), self.decoder.norm_eps)

    def ones(self, *shape: int) -> ir.Value:
        return self.tape.constant(np.ones(shape), np.float32)

    def split(self, value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """Parts of the last dimension."""
        if len(sizes) == 1:
            return [value]
        parts: list[ir.Value] = self.tape.op("Split", value, self.tape.constant(sizes), outputs=len(sizes), axis=-1)
        return parts

    def clip(self, value: ir.Value, low: float | None, high: float) -> ir.Value:
        bounds = [None if bound is None else self.tape.number(bound) for bound in (low, high)]
        clipped: ir.Value = self.tape.op("Clip", value, *bounds)
        return clipped

    def gated(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        """silu(gate) * up, both clipped."""
        limit = self.decoder.experts.limit
        active = self.dialect.silu(self.clip(gate, None, limit))
        product: ir.Value = self.tape.op("Mul", active, self.clip(up, -limit, limit))
        return product

    def _stored(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, change: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> ir.Value:
        self.weights.shape(name)  # a missing tensor is found before anything is written

        def read() -> NDArray[Any]:
            array = np.ascontiguousarray(change(self.weights.read(name)), dtype=dtype.numpy())
            if array.shape != tuple(shape):
                raise ExportError(
                    f"{name}: expected shape {tuple(shape)} as config.json says, got {array.shape}; the checkpoint's "
                    "files do not belong together"
                )
            return array

        return self.tape.stored(name, shape, dtype, read)
