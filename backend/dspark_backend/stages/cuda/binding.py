"""I/O binding of device memory to an ONNX Runtime session: the cache in place, rows that stay on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.binding import CpuBinding
from dspark_backend.stages.cuda.device import Device, Memory
from dspark_backend.stages.cuda.rows import DeviceRows, RowSpan
from dspark_backend.stages.cuda.slots import CacheLayout, DeviceSlots
from dspark_backend.stages.rows import Rows
from dspark_backend.stages.slot_arrays import SlotWindow

_ITEM = 4


@dataclass(frozen=True)
class BoundCache:
    """A window of one array of a cache in device memory."""

    address: int
    shape: tuple[int, int, int, int]


class DeviceCache:
    """The same as :class:`~dspark_backend.stages.slot_arrays.SlotArrays`, float32, in the memory of a device."""

    def __init__(self, device: Device, shapes: Sequence[tuple[int, int]]) -> None:
        self._shapes = [shape for shape in shapes for _ in range(2)]
        self._slots = DeviceSlots(device, ())

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        layouts = [CacheLayout(heads, capacity, head_dim, _ITEM) for heads, head_dim in self._shapes]
        self._slots.reallocate(num_slots, layouts, moves)

    def window(self, slots: Sequence[int]) -> SlotWindow:
        """The smallest window that holds all of ``slots``, at least one."""
        first = min(slots)
        count = max(slots) + 1 - first
        values = tuple(
            BoundCache(address, (count, layout.num_heads, layout.capacity, layout.head_dim))
            for address, layout in zip(self._slots.addresses(first), self._slots.layouts, strict=True)
        )
        return SlotWindow(first, count, values)

    def copy_rows(self, move: RowMove) -> None:
        self._slots.copy_rows(move)

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self._slots.clear_rows(slot, first)

    def clear(self) -> None:
        """Give the memory back."""
        self._slots.clear()


class DeviceBinding(CpuBinding):
    """A session on a device: small arrays come and go through host memory, caches and rows stay."""

    def __init__(self, session: ort.InferenceSession, device: Device) -> None:
        super().__init__(session)
        self._device = device
        self._rows: dict[str, Memory] = {}

    def cache(self, window: SlotWindow) -> None:
        for index, value in enumerate(window.values):
            name = f"{'value' if index % 2 else 'key'}_cache_{index // 2}"
            place = (self._device.kind, self._device.ordinal, np.float32, value.shape, value.address)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(f"{name}_out", *place)

    def input_rows(self, name: str, rows: Rows) -> None:
        if not isinstance(rows, DeviceRows):
            super().input_rows(name, rows)
            return
        memory = self._memory(name, (len(rows), rows.width))
        rows.copy_to(memory.address)
        # Of the same name as an array in host memory, perhaps, which run() must not bind again.
        self._inputs.forget(name)
        shape = (len(rows), rows.width)
        self._binding.bind_input(name, self._device.kind, self._device.ordinal, np.float32, shape, memory.address)

    def output_rows(self, name: str, shape: tuple[int, int]) -> Rows:
        memory = self._memory(name, shape)
        self._binding.bind_output(name, self._device.kind, self._device.ordinal, np.float32, shape, memory.address)
        return DeviceRows(self._device, shape[1], (RowSpan(memory, 0, shape[0]),))

    def run(self) -> None:
        # ONNX Runtime copies an input from the host when it is bound, not when it runs.
        self._inputs.bind_again()
        super().run()

    def clear(self) -> None:
        super().clear()
        self._rows.clear()

    def _memory(self, name: str, shape: tuple[int, int]) -> Memory:
        """At least as much as rows of this shape need; grows, never shrinks."""
        size = math.prod(shape) * _ITEM
        memory = self._rows.get(name)
        if memory is None or memory.size < size:
            memory = self._rows[name] = Memory(self._device, max(size, 1 if memory is None else 2 * memory.size))
        return memory
