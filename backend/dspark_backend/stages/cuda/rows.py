"""Rows on a device: logits until somebody samples from them, features on their way from the verifier to the drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.cuda.device import Device, Memory
from dspark_backend.stages.rows import FloatArray, RemoteRows

_ITEM = 4


@dataclass(frozen=True)
class RowSpan:
    """Consecutive rows of some memory, which it keeps alive."""

    memory: Memory
    first: int
    count: int
    offset: int = 0
    """Bytes from the beginning of the memory to row 0."""


class DeviceRows:
    """Implements :class:`~dspark_backend.stages.rows.RemoteRows`: float32 rows of ``width`` numbers in spans."""

    def __init__(self, device: Device, width: int, spans: tuple[RowSpan, ...]) -> None:
        self._device = device
        self.width = width
        self.spans = spans

    def __len__(self) -> int:
        return sum(span.count for span in self.spans)

    @overload
    def __getitem__(self, place: int) -> FloatArray: ...

    @overload
    def __getitem__(self, place: slice) -> DeviceRows: ...

    def __getitem__(self, place: int | slice) -> FloatArray | DeviceRows:
        if isinstance(place, slice):
            start, end, step = place.indices(len(self))
            if step != 1:
                raise IndexError(f"rows: expected a slice of step 1, got {step}")
            return DeviceRows(self._device, self.width, tuple(_cut(self.spans, start, end)))
        index = range(len(self))[place]
        row: FloatArray = np.asarray(self[index : index + 1])[0]
        return row

    def copy(self) -> DeviceRows:
        """The rows in memory of their own: the step's buffers are written over by the next one."""
        memory = Memory(self._device, max(1, len(self) * self.width * _ITEM))
        self.copy_to(memory.address)
        return DeviceRows(self._device, self.width, (RowSpan(memory, 0, len(self)),))

    def copy_to(self, address: int) -> None:
        """Put the rows one after another at a place of the device."""
        row = self.width * _ITEM
        for span in self.spans:
            self._device.copy(address, self._address(span), span.count * row)
            address += span.count * row

    def _address(self, span: RowSpan) -> int:
        return span.memory.address + span.offset + span.first * self.width * _ITEM

    def join(self, others: Sequence[RemoteRows]) -> DeviceRows:
        """Raises TypeError for rows of another runtime."""
        spans = list(self.spans)
        for other in others:
            if not isinstance(other, DeviceRows) or other.width != self.width:
                raise TypeError("rows: expected rows of one device and one width")
            spans += other.spans
        return DeviceRows(self._device, self.width, tuple(spans))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("rows on a device cannot be read without a copy")
        found = np.empty((len(self), self.width), dtype=np.float32)
        at = 0
        for span in self.spans:
            self._device.download(found[at : at + span.count], self._address(span))
            at += span.count
        self._device.synchronize()
        return found if dtype is None else found.astype(dtype, copy=False)


def _cut(spans: Sequence[RowSpan], start: int, end: int) -> list[RowSpan]:
    """What of the rows start .. end-1 lies in each span."""
    found, at = [], 0
    for span in spans:
        low, high = max(start, at), min(end, at + span.count)
        if low < high:
            found.append(RowSpan(span.memory, span.first + low - at, high - low, span.offset))
        at += span.count
    return found
