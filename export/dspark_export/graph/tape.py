"""A thin layer over ``onnx_ir`` that makes graph code read like array code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

CONTRIB = "com.microsoft"
OPSET = 21
IR_VERSION = 10

_STORAGE = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


class GraphTape:
    """Collects nodes and initializers; every method that adds a node returns its output value.

    Weights are lazy: their ``read`` function runs when the graph is saved, one tensor at a time, so that an export
    needs little more memory than its largest tensor.
    """

    def __init__(self, weight_dtype: str) -> None:
        self._tape = ir.tape.Tape()
        self._weight_dtype = weight_dtype
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Add a node. Returns its output, or the list of them where ``outputs`` is more than 1."""
        if outputs == 1:
            return self._tape.op(op_type, inputs, attributes, domain=domain)
        return self._tape.op_multi_out(op_type, inputs, attributes, domain=domain, num_outputs=outputs)

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant, shared where the same one was asked for before."""
        array = np.asarray(values, dtype=dtype)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._tape.initializer(ir.tensor(array, name=name))
        return self._constants[key]

    def table(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A computed array, kept in its own dtype."""
        return self._tape.initializer(ir.tensor(array, name=name))

    def weight(self, name: str, shape: Sequence[int], read: Callable[[], NDArray[Any]]) -> ir.Value:
        """A checkpoint's tensor in the storage dtype, cast to float32 where that is another one."""
        dtype = _STORAGE[self._weight_dtype]

        def load() -> ir.TensorProtocol:
            array = np.ascontiguousarray(read(), dtype=dtype.numpy())
            if array.shape != tuple(shape):
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {array.shape}")
            return ir.Tensor(array, name=name)

        stored: ir.Value = self._tape.initializer(ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=name))
        if dtype == ir.DataType.FLOAT:
            return stored
        cast: ir.Value = self.op("Cast", stored, to=ir.DataType.FLOAT)
        return cast

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape to a shape of constants, at most one of them -1; 0 keeps the input's size there."""
        reshaped: ir.Value = self.op("Reshape", value, self.constant(shape))
        return reshaped

    def model(
        self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], metadata: Mapping[str, str]
    ) -> ir.Model:
        """Close the graph."""
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET, CONTRIB: 1},
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="dspark-export",
            metadata_props=dict(metadata),
        )


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A graph input; strings name dynamic dimensions."""
    return ir.val(name, dtype=dtype, shape=ir.Shape(shape))


def graph_output(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Name and type a value that leaves the graph."""
    value.name = name
    value.dtype = dtype
    value.shape = ir.Shape(shape)
    return value
