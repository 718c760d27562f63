"""A slot cache in numpy arrays, and the parts of it that a step binds in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from dspark_backend.stages.batch import FloatArray, RowMove

_MAX_WINDOWS = 64
"""Windows of a cache that are kept; there are a few hundred possible ones, and few in use at a time."""


@dataclass(frozen=True, eq=False)
class SlotWindow:
    """Neighbouring slots of every array of a cache, as the runtime takes them. Stale after the next allocation."""

    first: int
    """Index of its first slot."""
    count: int
    values: tuple[ort.OrtValue, ...]


class SlotArrays:
    """Keys and values of every layer, float32 [slots, Hkv, capacity, D] each, as key 0, value 0, key 1, ...

    ``shapes`` are (Hkv, D) of every layer.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.arrays: list[FloatArray] = [
            np.zeros((0, kv_heads, 0, head_dim), dtype=np.float32) for kv_heads, head_dim in shapes for _ in range(2)
        ]
        self._windows: dict[tuple[int, int], SlotWindow] = {}

    @property
    def capacity(self) -> int:
        """Rows of a slot."""
        return self.arrays[0].shape[2]

    def window(self, slots: Sequence[int]) -> SlotWindow:
        """The smallest window that holds all of ``slots``, at least one."""
        first, last = min(slots), max(slots)
        window = self._windows.get((first, last))
        if window is None:
            values = tuple(ort.OrtValue.ortvalue_from_numpy(array[first : last + 1]) for array in self.arrays)
            window = self._windows[first, last] = SlotWindow(first, last - first + 1, values)
            if len(self._windows) > _MAX_WINDOWS:
                del self._windows[next(iter(self._windows))]
        return window

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        """New arrays, filled with the rows that ``moves`` names."""
        # They hold the old arrays, which could not be freed one by one.
        self._windows.clear()
        for index, old in enumerate(self.arrays):
            # Zeros, not empty: a masked position has weight 0, and 0 times a stale NaN would be NaN.
            fresh = np.zeros((num_slots, old.shape[1], capacity, old.shape[3]), dtype=np.float32)
            for move in moves:
                fresh[move.target, :, : move.length] = old[move.source, :, : move.length]
            self.arrays[index] = fresh

    def copy_rows(self, move: RowMove) -> None:
        for array in self.arrays:
            array[move.target, :, : move.length] = array[move.source, :, : move.length]

    def clear_rows(self, slot: int, first: int = 0) -> None:
        for array in self.arrays:
            array[slot, :, first:] = 0.0

    def clear(self) -> None:
        """Give the memory back."""
        self.allocate(0, 0, ())
