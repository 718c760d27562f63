"""I/O binding of numpy arrays to an ONNX Runtime session on the CPU, by address, and a slot cache bound in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.batch import FloatArray, RowMove


def open_session(path: Path, threads: int, shared: dict[str, FloatArray] | None = None) -> ort.InferenceSession:
    """A CPU session of a graph; ``shared`` provides initializers that the file only names.

    Raises:
        ArtifactError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if shared:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in shared.values()]
        options.add_external_initializers(list(shared), values)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise ArtifactError(f"{path}: ONNX Runtime cannot load the graph: {error}") from error


class CpuBinding:
    """A session with its bound arrays. The caller keeps the arrays alive until ``run`` returns."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._window: tuple[int, int, int] | None = None

    def input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def cache(self, cache: SlotArrays, first: int, count: int) -> None:
        """Bind slots first .. first+count-1 of every cache, the same memory as input and as output."""
        window = (cache.generation, first, count)
        if self._window == window:
            return
        for index, array in enumerate(cache.arrays):
            name = f"{'value' if index % 2 else 'key'}_cache_{index // 2}"
            rows = array[first : first + count]
            self.input(name, rows)
            self.output(f"{name}_out", rows)
        self._window = window

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def clear(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._window = None


class SlotArrays:
    """Keys and values of every layer, float32 [slots, Hkv, capacity, D] each, as key 0, value 0, key 1, ..."""

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self.arrays: list[FloatArray] = [
            np.zeros((0, num_kv_heads, 0, head_dim), dtype=np.float32) for _ in range(2 * num_layers)
        ]
        self.generation = 0
        """Grows with every allocation: what was bound before is stale."""

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        """New arrays, filled with the rows that ``moves`` names."""
        shape = (num_slots, self._num_kv_heads, capacity, self._head_dim)
        self.generation += 1
        for index, old in enumerate(self.arrays):
            # Zeros, not empty: a masked position has weight 0, and 0 times a stale NaN would be NaN.
            fresh = np.zeros(shape, dtype=np.float32)
            for move in moves:
                fresh[move.target, :, : move.length] = old[move.source, :, : move.length]
            self.arrays[index] = fresh

    def copy_rows(self, move: RowMove) -> None:
        for array in self.arrays:
            array[move.target, :, : move.length] = array[move.source, :, : move.length]

    def clear_rows(self, slot: int) -> None:
        for array in self.arrays:
            array[slot] = 0.0

    def clear(self) -> None:
        """Give the memory back."""
        self.allocate(0, 0, ())
