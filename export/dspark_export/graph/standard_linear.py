"""Products with constant weights for TensorRT: in the compute dtype, in fp8, or with int4 weights.

fp8: E4M3, weights scaled per output channel, activations per tensor by a scale that is known when the engine is built
(TensorRT takes no other). int4: weights alone, symmetric, a scale for every
``INT4_BLOCK`` input channels of an output channel. Both as Quantize/DequantizeLinear around a MatMul. The LM head keeps
the compute dtype: it is shared with the drafter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.shared_weights import SHARED_HEAD
from dspark_export.graph.dialect import Dialect
from dspark_export.graph.linear import fused_weight, total_width, with_bias
from dspark_export.quantization.int4 import INT4_BLOCK, Int4Matrix, fits_int4, nearest_int4
from dspark_export.quantization.int4_weights import Int4Weights
from dspark_export.quantization.plan import fused_name
from dspark_export.weights import WeightSource

FP8_LARGEST = 448.0
Products = Literal["plain", "fp8", "int4"]


@dataclass(frozen=True)
class StandardLinears:
    """Implements :class:`~dspark_export.graph.linear.Linears`."""

    dialect: Dialect
    weights: WeightSource
    products: Products = "plain"
    input_scales: Mapping[str, float] = field(default_factory=dict)
    """For fp8, by the fused name of each product: largest magnitude of its input / 448. Products without one keep the
    compute dtype."""
    rounded: Int4Weights | None = None
    """For int4: products that a calibration pass rounded; the others are rounded to the nearest."""

    def smoothing(self, names: tuple[str, ...]) -> FloatArray | None:
        return None

    def apply(
        self,
        value: ir.Value,
        names: tuple[str, ...],
        inner: int,
        bias: bool,
        divisors: Mapping[str, FloatArray] | None = None,
    ) -> ir.Value:
        assert not divisors
        tape, fused, width = self.dialect.tape, fused_name(names), total_width(self.weights, names)
        # int4 blocks must fill the inner dimension; the few small products that do not stay as they are.
        if self.products == "fp8" and fused in self.input_scales:
            value, weight = self._fp8(value, names, inner, width)
        elif self.products == "int4" and fits_int4(inner, width):
            weight = self._int4(names, inner, width)
        else:
            weight = tape.weight(f"{fused}.weight", (inner, width), lambda: fused_weight(self.weights, names))
        product: ir.Value = tape.op("MatMul", value, weight)
        return with_bias(tape, product, self.weights, names) if bias else product

    def head(self, value: ir.Value, name: str, vocab: int, inner: int) -> ir.Value:
        logits: ir.Value = self.dialect.tape.op(
            "Gemm", value, self.dialect.shared(SHARED_HEAD, (vocab, inner)), transB=1
        )
        return logits

    def _matrix(self, names: tuple[str, ...]) -> FloatArray:
        return fused_weight(self.weights, names).astype(np.float32)

    def _fp8(self, value: ir.Value, names: tuple[str, ...], inner: int, width: int) -> tuple[ir.Value, ir.Value]:
        """What the product reads and multiplies with, both through fp8."""
        tape, fused = self.dialect.tape, fused_name(names)
        scale = tape.number(self.input_scales[fused])
        zero = tape.constant(0.0, ml_dtypes.float8_e4m3fn)
        value = tape.op("DequantizeLinear", tape.op("QuantizeLinear", value, scale, zero), scale)
        compute = tape.compute

        def scales(matrix: FloatArray) -> Any:
            largest = np.maximum(np.abs(matrix).max(axis=0), 1e-12) / FP8_LARGEST
            return largest.astype(compute.numpy())

        def stored() -> Any:
            matrix = self._matrix(names)
            scaled = matrix / scales(matrix).astype(np.float32)
            return np.clip(scaled, -FP8_LARGEST, FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn)

        weight = tape.stored(f"{fused}.weight.fp8", (inner, width), ir.DataType.FLOAT8E4M3FN, stored)
        columns = tape.stored(f"{fused}.scales", (width,), compute, lambda: scales(self._matrix(names)))
        return value, tape.op("DequantizeLinear", weight, columns, axis=1)

    def _int4(self, names: tuple[str, ...], inner: int, width: int) -> ir.Value:
        tape, fused, compute = self.dialect.tape, fused_name(names), self.dialect.tape.compute

        def rounded() -> Int4Matrix:
            if self.rounded is not None and fused in self.rounded:
                return self.rounded.read(fused)
            return nearest_int4(self._matrix(names), compute.numpy())

        weight = tape.stored(
            f"{fused}.weight.int4", (inner, width), ir.DataType.INT4, lambda: rounded().values.astype(ml_dtypes.int4)
        )
        columns = tape.stored(
            f"{fused}.scales", (inner // INT4_BLOCK, width), compute, lambda: rounded().scales.astype(compute.numpy())
        )
        dequantised: ir.Value = tape.op("DequantizeLinear", weight, columns, axis=0, block_size=INT4_BLOCK)
        return dequantised
