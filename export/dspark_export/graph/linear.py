"""Products with constant weights, in float32 or in int8. Both keep a row's result independent of the other rows.

Int8 (per-token activations, per-channel weights): a row is scaled by its own largest magnitude to [-127, 127], rounded,
and multiplied in integers, whose sums are exact; so the result of a row does not depend on the rows beside it, on how
many there are, or on the order in which a kernel adds. Activations are unsigned around 128, because only unsigned times
signed products have fast kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.int8 import LEVELS, column_scales, round_columns
from dspark_export.graph.tape import CONTRIB, GraphTape
from dspark_export.quantization.plan import DIGIT, Int8Plan, LinearPlan, fused_name
from dspark_export.quantization.rounding import compensated_rounding
from dspark_export.weights import WeightSource

_ZERO_POINT = 128


class Linears(Protocol):
    """Builds products ``[B, inner] @ [inner, sum of widths]`` on a tape."""

    def smoothing(self, names: tuple[str, ...]) -> FloatArray | None:
        """What the product of ``names`` expects its input channels to be divided by; None for nothing."""

    def apply(
        self,
        value: ir.Value,
        names: tuple[str, ...],
        inner: int,
        bias: bool,
        divisors: Mapping[str, FloatArray] | None = None,
    ) -> ir.Value:
        """The projections ``names`` side by side. ``divisors``: output channels of a projection are divided by them."""

    def head(self, value: ir.Value, name: str, vocab: int, inner: int) -> ir.Value:
        """The LM head, whose weight [V, H] may be the embedding."""


def fused_weight(weights: WeightSource, names: tuple[str, ...]) -> FloatArray:
    """[inner, sum of widths]"""
    joined: FloatArray = np.concatenate([weights.read(f"{name}.weight") for name in names])
    return joined.T


def fused_bias(weights: WeightSource, names: tuple[str, ...]) -> FloatArray:
    """[sum of widths]"""
    joined: FloatArray = np.concatenate([weights.read(f"{name}.bias") for name in names])
    return joined


def total_width(weights: WeightSource, names: tuple[str, ...]) -> int:
    return sum(weights.shape(f"{name}.weight")[0] for name in names)


def with_bias(tape: GraphTape, product: ir.Value, weights: WeightSource, names: tuple[str, ...]) -> ir.Value:
    """A product of the projections ``names`` plus their biases, in the tape's storage."""
    width = total_width(weights, names)
    offset = tape.weight(f"{fused_name(names)}.bias", (width,), lambda: fused_bias(weights, names))
    shifted: ir.Value = tape.op("Add", product, offset)
    return shifted


@dataclass(frozen=True)
class FloatLinears:
    """Float32 products; weights may be stored smaller."""

    tape: GraphTape
    weights: WeightSource
    inputs: dict[str, ir.Value] | None = None
    """Where given, filled with the input of every product, for a calibration pass to look at."""

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
        self._note(names, value)
        fused, width = fused_name(names), total_width(self.weights, names)
        weight = self.tape.weight(f"{fused}.weight", (inner, width), lambda: fused_weight(self.weights, names))
        product: ir.Value = self.tape.op("MatMul", value, weight)
        return with_bias(self.tape, product, self.weights, names) if bias else product

    def head(self, value: ir.Value, name: str, vocab: int, inner: int) -> ir.Value:
        self._note((name,), value)
        full = f"{name}.weight"
        weight = self.tape.weight(full, (vocab, inner), lambda: self.weights.read(full))
        logits: ir.Value = self.tape.op("Gemm", value, weight, transB=1)
        return logits

    def _note(self, names: tuple[str, ...], value: ir.Value) -> None:
        if self.inputs is not None:
            self.inputs[fused_name(names)] = value


@dataclass(frozen=True)
class Int8Linears:
    """Int8 products of the rows that ``rows`` counts."""

    tape: GraphTape
    weights: WeightSource
    plan: Int8Plan
    rows: ir.Value
    """Any value [B, ...] with a row for each row of the products' inputs."""
    _zero_points: list[ir.Value] = field(default_factory=list)
    _scales: dict[str, ir.Value] = field(default_factory=dict)
    _copies: Counter[str] = field(default_factory=Counter)

    def smoothing(self, names: tuple[str, ...]) -> FloatArray | None:
        return self.plan.of(names).smoothing

    def apply(
        self,
        value: ir.Value,
        names: tuple[str, ...],
        inner: int,
        bias: bool,
        divisors: Mapping[str, FloatArray] | None = None,
    ) -> ir.Value:
        plan, fused, width = self.plan.of(names), fused_name(names), total_width(self.weights, names)

        def matrix() -> FloatArray:
            full = fused_weight(self.weights, names).astype(np.float32)
            return full if plan.smoothing is None else full * plan.smoothing[:, None]

        scales = column_scales(matrix())
        columns = _columns(self.weights, names, divisors)
        if fused not in self._scales:
            self._scales[fused] = self.tape.table(f"{fused}.scales", scales / columns)
        # Where a product is built several times each has a copy of its own: ONNX Runtime's rewrite for processors
        # without VNNI fails where two share a matrix.
        self._copies[fused] += 1
        weight = self.tape.stored(
            f"{fused}.weight.int8.{self._copies[fused]}",
            (inner, width),
            ir.DataType.INT8,
            lambda: _rounded_weight(matrix(), scales, plan),
        )
        product = self._product(value, weight, self._scales[fused], plan.two_digits)
        if not bias:
            return product
        offset = fused_bias(self.weights, names).astype(np.float32) / columns
        shifted: ir.Value = self.tape.op("Add", product, self.tape.table(f"{fused}.bias", offset))
        return shifted

    def head(self, value: ir.Value, name: str, vocab: int, inner: int) -> ir.Value:
        return self.apply(value, (name,), inner, bias=False)

    def shared_head(self, value: ir.Value, weight: ir.Value, scales: ir.Value) -> ir.Value:
        """The product with a head that is given as int8 [H, V] and its scales [V]."""
        return self._product(value, weight, scales, two_digits=False)

    def _product(self, value: ir.Value, weight: ir.Value, scales: ir.Value, two_digits: bool) -> ir.Value:
        tape = self.tape
        # A row of zeros has scale 0: whatever 0/0 rounds to is an integer, and times 0 it is 0 again.
        largest = tape.op("ReduceMax", tape.op("Abs", value), tape.constant([1]), keepdims=0)
        unit = tape.op("Mul", largest, tape.constant(1.0 / LEVELS, np.float32))
        digit = self._rounded(value, unit)
        column = tape.op("Unsqueeze", unit, tape.constant([1]))
        if not two_digits:
            scaled: ir.Value = tape.op("Mul", self._integer_product(digit, weight, scales), column)
            return scaled
        coarse = tape.op("DequantizeLinear", digit, unit, self._zeros(), axis=0)
        finer = tape.op("Mul", unit, tape.constant(1.0 / DIGIT, np.float32))
        second = self._rounded(tape.op("Sub", value, coarse), finer)
        # One product of twice the rows: the weights are read once.
        both = self._integer_product(tape.op("Concat", digit, second, axis=0), weight, scales)
        high, low = tape.op("Split", both, outputs=2, axis=0, num_outputs=2)
        total = tape.op("Add", high, tape.op("Mul", low, tape.constant(1.0 / DIGIT, np.float32)))
        summed: ir.Value = tape.op("Mul", total, column)
        return summed

    def _rounded(self, value: ir.Value, unit: ir.Value) -> ir.Value:
        rounded: ir.Value = self.tape.op("QuantizeLinear", value, unit, self._zeros(), axis=0)
        return rounded

    def _integer_product(self, digits: ir.Value, weight: ir.Value, scales: ir.Value) -> ir.Value:
        product: ir.Value = self.tape.op(
            "MatMulIntegerToFloat",
            digits, weight, self.tape.constant(1.0, np.float32), scales, self.tape.constant(_ZERO_POINT, np.uint8),
            domain=CONTRIB,
        )  # fmt: skip
        return product

    def _zeros(self) -> ir.Value:
        """uint8 [B], made once for all products of these rows."""
        if not self._zero_points:
            shape = self.tape.outside("Shape", self.rows, start=0, end=1)
            self._zero_points.append(self.tape.outside("Expand", self.tape.constant(_ZERO_POINT, np.uint8), shape))
        return self._zero_points[0]


def _rounded_weight(matrix: FloatArray, scales: FloatArray, plan: LinearPlan) -> NDArray[np.int8]:
    if plan.gram is None:
        return round_columns(matrix, scales)
    return compensated_rounding(matrix, scales, plan.gram)


def _columns(
    weights: WeightSource, names: tuple[str, ...], divisors: Mapping[str, FloatArray] | None
) -> FloatArray:  # fmt: skip
    """The divisors of all output channels, float32 [sum of widths], 1 where there are none."""
    parts = []
    for name in names:
        width = weights.shape(f"{name}.weight")[0]
        given = (divisors or {}).get(name)
        parts.append(np.ones(width, dtype=np.float32) if given is None else given)
    return np.concatenate(parts)
