"""A thin layer over ``onnx_ir`` that makes graph code read like array code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dspark_backend.stages.artifact import TensorLocation
from dspark_export.errors import ExportError

CONTRIB = "com.microsoft"
OPSET = 21
SHARED_LOCATION = "provided-at-load"
"""Stands where the data of shared initializers would be; no such file exists."""
IR_VERSION = 10
STANDARD_IR_VERSION = 11

_INLINE_BYTES = 256
"""Smaller tensors stay in the graph's own file."""

LoopBody: TypeAlias = Callable[[ir.Value, list[ir.Value]], tuple[Sequence[ir.Value], Sequence[ir.Value]]]
"""(which turn this is, int64 []; what the turn before left) -> (what this one leaves, what it adds to the gathered)."""

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

    def __init__(self, weight_dtype: str, standard_opset: int | None = None) -> None:
        """Computes in float32 whatever weights are stored in; with ``standard_opset`` in the weights' dtype, by
        operators of that version of the ONNX standard alone."""
        self._outer = self._tape = ir.tape.Tape()
        self._weight_dtype = weight_dtype
        self._opsets = {"": OPSET, CONTRIB: 1} if standard_opset is None else {"": standard_opset}
        self.compute = ir.DataType.FLOAT if standard_opset is None else _STORAGE[weight_dtype]
        """What products, norms and caches are in."""
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Add a node. Returns its output, or the list of them where ``outputs`` is more than 1."""
        if outputs == 1:
            return self._tape.op(op_type, inputs, attributes, domain=domain)
        return self._tape.op_multi_out(op_type, inputs, attributes, domain=domain, num_outputs=outputs)

    def outside(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """A node outside of the loop that is being built, if any: made once, and for whoever asks next."""
        return self._outer.op(op_type, inputs, attributes)

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant, shared where the same one was asked for before."""
        array = np.asarray(values, dtype=dtype)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._outer.initializer(ir.tensor(array, name=name))
        return self._constants[key]

    def number(self, value: float | NDArray[Any]) -> ir.Value:
        """A number, or some, in the compute dtype."""
        return self.constant(value, self.compute.numpy())

    def to_float(self, value: ir.Value) -> ir.Value:
        """A value of the compute dtype in float32."""
        if self.compute == ir.DataType.FLOAT:
            return value
        cast: ir.Value = self.op("Cast", value, to=ir.DataType.FLOAT)
        return cast

    def to_compute(self, value: ir.Value) -> ir.Value:
        """A float32 value in the compute dtype."""
        if self.compute == ir.DataType.FLOAT:
            return value
        cast: ir.Value = self.op("Cast", value, to=self.compute)
        return cast

    def table(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A computed array, kept in its own dtype."""
        return self._outer.initializer(ir.tensor(array, name=name))

    def weight(self, name: str, shape: Sequence[int], read: Callable[[], NDArray[Any]]) -> ir.Value:
        """A checkpoint's tensor in the storage dtype, cast to float32 where that is another one; once for each name."""
        if name in self._weights:
            return self._weights[name]
        dtype = _STORAGE[self._weight_dtype]

        def load() -> ir.TensorProtocol:
            array = np.ascontiguousarray(read(), dtype=dtype.numpy())
            if array.shape != tuple(shape):
                raise ExportError(
                    f"{name}: expected shape {tuple(shape)} as config.json says, got {array.shape}; the checkpoint's "
                    "files do not belong together"
                )
            return ir.Tensor(array, name=name)

        value = self._outer.initializer(ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(shape), name=name))
        if dtype != self.compute:
            value = self.outside("Cast", value, to=self.compute)
        self._weights[name] = value
        return value

    def stored(self, name: str, shape: Sequence[int], dtype: ir.DataType, read: Callable[[], NDArray[Any]]) -> ir.Value:
        """An array that is computed when the graph is saved, in the dtype it has; once for each name."""
        if name not in self._weights:
            self._weights[name] = self._outer.initializer(
                ir.LazyTensor(lambda: ir.Tensor(read(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name)
            )
        return self._weights[name]

    def shared(self, name: str, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """An initializer without data: whoever loads the graph provides it under this name."""
        size = dtype.itemsize * int(np.prod(shape))
        tensor = ir.ExternalTensor(SHARED_LOCATION, 0, int(size), dtype, shape=ir.Shape(shape), name=name, base_dir="")
        return self._outer.initializer(tensor)

    def reshape(self, value: ir.Value, shape: Sequence[int | ir.Value]) -> ir.Value:
        """Reshape to sizes, at most one of them -1; 0 keeps the input's size there. A value is int64 [1]."""
        wanted: ir.Value
        if all(isinstance(size, int) for size in shape):
            wanted = self.constant(shape)
        else:
            sizes = (self.constant([size]) if isinstance(size, int) else size for size in shape)
            wanted = self.op("Concat", *sizes, axis=0)
        reshaped: ir.Value = self.op("Reshape", value, wanted)
        return reshaped

    def range(self, count: ir.Value) -> ir.Value:
        """0 .. ``count`` - 1 as int64 [count]; ``count`` is int64 [1]."""
        numbers: ir.Value = self.op("Range", self.constant(0), self.op("Squeeze", count), self.constant(1))
        return numbers

    def loop(self, count: ir.Value, carried: Sequence[ir.Value], body: LoopBody) -> list[ir.Value]:
        """Run ``body`` ``count`` times (int64 [1]). Returns what the last one left, then what they gathered, stacked.

        The body may use any value of the outer graph.
        """
        place = graph_input("place", ir.DataType.INT64, ())
        going = graph_input("going", ir.DataType.BOOL, ())
        before = [
            ir.val(f"carried_{index}", dtype=value.dtype, shape=value.shape) for index, value in enumerate(carried)
        ]
        self._tape = inner = ir.tape.Tape()
        try:
            after, gathered = body(place, before)
            leaving = [self.op("Identity", going), *(self.op("Identity", value) for value in (*after, *gathered))]
        finally:
            self._tape = self._outer
        # A body's names must differ from those of the graph around it, which are numbers of its own.
        for number, node in enumerate(inner.nodes):
            node.name = f"body_{number}_{node.op_type}"
            for index, output in enumerate(node.outputs):
                output.name = f"{node.name}_{index}"
        graph = ir.Graph([place, going, *before], leaving, nodes=inner.nodes, name="body")
        given = [self.op("Squeeze", count, self.constant([0])), None, *carried]
        return list(self.op("Loop", *given, body=graph, outputs=len(leaving) - 1))

    def model(
        self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], metadata: Mapping[str, str]
    ) -> ir.Model:
        """Close the graph."""
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=self._opsets,
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION if CONTRIB in self._opsets else STANDARD_IR_VERSION,
            producer_name="dspark-export",
            metadata_props=dict(metadata),
        )


def save_graph(
    model: ir.Model, directory: Path, name: str, progress: Callable[[float], None] = lambda _: None
) -> dict[str, TensorLocation]:
    """Write ``name`` and its weights, in ``name``.data beside it, into ``directory``. Weights are read one at a time.

    Returns where each weight is, by its name.
    """

    def written(_: object, info: ir.external_data.CallbackInfo) -> None:
        progress((info.index + 1) / info.total)

    own = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes > _INLINE_BYTES
    ]
    stored = ir.external_data.convert_tensors_to_external(
        [value.const_value for value in own if value.const_value is not None],
        directory,
        f"{name}.data",
        callback=written,
    )
    for value, tensor in zip(own, stored, strict=True):
        value.const_value = tensor
    try:
        ir.save(model, directory / name)
    except ir.serde.SerdeError as error:
        raise _own_error(error) from error
    names = {dtype: spelling for spelling, dtype in _STORAGE.items()}
    return {
        tensor.name: TensorLocation(
            f"{name}.data", tensor.offset or 0, tuple(tensor.shape.numpy()), names[tensor.dtype]
        )
        for tensor in stored
        if tensor.name is not None and tensor.dtype in names
    }


def _own_error(error: BaseException) -> BaseException:
    """What one of our lazy tensors raised, from inside the library's wrappers; else the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ExportError):
        found = found.__cause__
    return found or error


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A graph input; strings name dynamic dimensions."""
    return ir.val(name, dtype=dtype, shape=ir.Shape(shape))


def graph_output(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Name and type a value that leaves the graph."""
    value.name = name
    value.dtype = dtype
    value.shape = ir.Shape(shape)
    return value
