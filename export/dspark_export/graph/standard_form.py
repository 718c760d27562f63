"""Which form a graph takes: ONNX Runtime's, or the standard one and its precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from dspark_export.graph.dialect import Dialect
from dspark_export.graph.ort_dialect import OrtDialect
from dspark_export.graph.standard_dialect import STANDARD_OPSET, StandardDialect
from dspark_export.graph.standard_linear import Products, StandardLinears
from dspark_export.graph.tape import GraphTape
from dspark_export.quantization.int4_weights import Int4Weights
from dspark_export.weights import WeightSource


@dataclass(frozen=True)
class StandardForm:
    """The standard dialect; everything between products is in the dtype of the weights."""

    capacity: int
    """Static length of the caches."""
    products: Products = "plain"
    input_scales: Mapping[str, float] = field(default_factory=dict)
    """For fp8: see :class:`StandardLinears`."""
    rounded: Int4Weights | None = None
    """For int4: the same."""

    def linears(self, dialect: Dialect, weights: WeightSource) -> StandardLinears:
        return StandardLinears(dialect, weights, self.products, self.input_scales, self.rounded)


def make_dialect(weight_dtype: str, standard: StandardForm | None, update_index: ir.Value) -> Dialect:
    """The dialect on a fresh tape. ``update_index`` is the input that places new rows in the standard one."""
    if standard is None:
        return OrtDialect(GraphTape(weight_dtype))
    return StandardDialect(GraphTape(weight_dtype, STANDARD_OPSET), standard.capacity, update_index)
