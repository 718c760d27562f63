"""A slot cache in device memory: keys and values of every layer, and the copies that the protocol asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.cuda.device import BlockCopy, Device, Memory


@dataclass(frozen=True)
class CacheLayout:
    """One array [slots, heads, capacity, head_dim] of items of so many bytes."""

    num_heads: int
    capacity: int
    head_dim: int
    item: int

    @property
    def row_bytes(self) -> int:
        """Of one position of one head."""
        return self.head_dim * self.item

    @property
    def slot_bytes(self) -> int:
        return self.num_heads * self.capacity * self.row_bytes

    def copy(self, target: int, target_slot: int, source: int, source_slot: int, length: int) -> BlockCopy:
        """Rows 0 .. length-1 of a slot at address ``source`` to another at ``target``, both of this layout."""
        return BlockCopy(
            target=target + target_slot * self.slot_bytes,
            source=source + source_slot * self.slot_bytes,
            pitch=self.capacity * self.row_bytes,
            width=length * self.row_bytes,
            height=self.num_heads,
        )


class DeviceSlots:
    """Arrays of equal slots, each in its own memory. ``layouts`` are key 0, value 0, key 1, ..."""

    def __init__(self, device: Device, layouts: Sequence[CacheLayout]) -> None:
        self._device = device
        self.layouts = tuple(layouts)
        self.num_slots = 0
        self._arrays: list[Memory] = []

    def addresses(self, first: int) -> list[int]:
        """Of slot ``first`` in every array."""
        return [
            memory.address + first * layout.slot_bytes
            for memory, layout in zip(self._arrays, self.layouts, strict=True)
        ]

    def reallocate(self, num_slots: int, layouts: Sequence[CacheLayout], moves: Sequence[RowMove]) -> None:
        """New arrays of zeros, filled with the rows that ``moves`` names; array by array, to spare memory."""
        old, before = self._arrays, self.layouts
        # Should memory run out halfway, nothing is left that could be taken for a cache.
        self._arrays, self.num_slots = [], 0
        fresh: list[Memory] = []
        for index, layout in enumerate(layouts):
            memory = Memory(self._device, max(1, num_slots * layout.slot_bytes))
            # A masked position has weight 0, and 0 times a stale NaN would be NaN.
            self._device.zero(memory.address, num_slots * layout.slot_bytes)
            for move in moves:
                self._move(memory.address, layout, old[index].address, before[index], move)
            fresh.append(memory)
            if old:
                old[index].release()
        self._arrays, self.layouts, self.num_slots = fresh, tuple(layouts), num_slots

    def permute(self, moves: Sequence[RowMove]) -> None:
        """Rows move between slots of the same arrays as if all at once; slots that get none are zeros."""
        staying = {move.target for move in moves if move.source == move.target}
        moving = [move for move in moves if move.source != move.target]
        for memory, layout in zip(self._arrays, self.layouts, strict=True):
            held = []
            for move in moving:
                # Aside first: the target may be the source of another move.
                aside = Memory(self._device, layout.slot_bytes)
                self._device.copy(aside.address, memory.address + move.source * layout.slot_bytes, layout.slot_bytes)
                held.append(aside)
            for slot in range(self.num_slots):
                if slot not in staying:
                    self._device.zero(memory.address + slot * layout.slot_bytes, layout.slot_bytes)
            for move, aside in zip(moving, held, strict=True):
                self._device.copy_block(layout.copy(memory.address, move.target, aside.address, 0, move.length))

    def copy_rows(self, move: RowMove) -> None:
        for memory, layout in zip(self._arrays, self.layouts, strict=True):
            self._device.copy_block(layout.copy(memory.address, move.target, memory.address, move.source, move.length))

    def clear_rows(self, slot: int, first: int = 0) -> None:
        for memory, layout in zip(self._arrays, self.layouts, strict=True):
            size = (layout.capacity - first) * layout.row_bytes
            for head in range(layout.num_heads):
                row = head * layout.capacity + first
                self._device.zero(memory.address + slot * layout.slot_bytes + row * layout.row_bytes, size)

    def clear(self) -> None:
        """Give the memory back."""
        for memory in self._arrays:
            memory.release()
        self._arrays, self.num_slots = [], 0

    def _move(self, target: int, layout: CacheLayout, source: int, before: CacheLayout, move: RowMove) -> None:
        """Between arrays of another capacity: head by head, whose rows are contiguous."""
        size = move.length * layout.row_bytes
        for head in range(layout.num_heads):
            to = target + move.target * layout.slot_bytes + head * layout.capacity * layout.row_bytes
            of = source + move.source * before.slot_bytes + head * before.capacity * before.row_bytes
            self._device.copy(to, of, size)
