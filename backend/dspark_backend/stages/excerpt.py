"""What prompts need of a slot cache, in a smaller one: attention reads all rows of a slot, whoever has come how far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dspark_backend.stages.batch import FloatArray, StepBatch
from dspark_backend.stages.slot_arrays import SlotArrays

_STEP = 64
"""Rows of a slot are a multiple of this."""
_LEAST = 128
"""Rows of a slot, at least."""
_COPIED = 4
"""Rows of an excerpt, at most, for each token of the step: they are copied, and take memory beside the cache's, outside
the engine's budget (as many rows as so many chunks of prompts have tokens)."""
_SHARE = 0.75
"""Of the cache's capacity, at most: less would not be saved."""


@dataclass(frozen=True)
class Excerpt:
    """The slots of one step as slots 0, 1, ... of a cache of their own, for as long as the step takes."""

    cache: SlotArrays
    _whole: SlotArrays
    _slots: list[int]
    _written: list[slice]
    """Rows of each slot that the step writes."""

    def put_back(self) -> None:
        """What the step wrote goes into the whole cache."""
        for array, part in zip(self._whole.arrays, self.cache.arrays, strict=True):
            for place, (slot, rows) in enumerate(zip(self._slots, self._written, strict=True)):
                array[slot, :, rows] = part[place, :, rows]


class Excerpts:
    """Makes excerpts of a cache, one at a time: the next one takes the memory of the last."""

    def __init__(self, whole: SlotArrays) -> None:
        self._whole = whole
        self._memory: list[FloatArray] = []
        """Of the excerpt's arrays. New memory would cost more time, for its pages, than what is copied into it."""

    def of(self, batch: StepBatch) -> Excerpt | None:
        """None where it would not pay: for a few tokens behind many, or where the whole cache is hardly larger."""
        if len(batch.slots) * _LEAST > _COPIED * batch.num_tokens:
            return None  # as every decoding step: nothing else is worth computing for it
        offsets = batch.offsets
        starts = batch.positions[offsets[:-1]].tolist()
        ends = (batch.positions[offsets[1:] - 1] + 1).tolist()
        capacity = max(_LEAST, -(-max(ends) // _STEP) * _STEP)
        if len(ends) * capacity > _COPIED * batch.num_tokens or capacity > _SHARE * self._whole.capacity:
            return None
        slots = batch.slots.tolist()
        cache = SlotArrays(())
        cache.arrays = self._arrays(len(slots), capacity)
        for array, part in zip(self._whole.arrays, cache.arrays, strict=True):
            for place, (slot, start, end) in enumerate(zip(slots, starts, ends, strict=True)):
                part[place, :, :start] = array[slot, :, :start]
                # A masked position has weight 0, and 0 times whatever was there could be NaN.
                part[place, :, end:] = 0.0
        return Excerpt(cache, self._whole, slots, [slice(*rows) for rows in zip(starts, ends, strict=True)])

    def _arrays(self, count: int, capacity: int) -> list[FloatArray]:
        """Uninitialised, [count, Hkv, capacity, D] each."""
        shapes = [(count, array.shape[1], capacity, array.shape[3]) for array in self._whole.arrays]
        sizes = [math.prod(shape) for shape in shapes]
        if not self._memory or any(len(kept) < size for kept, size in zip(self._memory, sizes, strict=True)):
            self._memory = [np.empty(size, dtype=np.float32) for size in sizes]
        return [kept[:size].reshape(shape) for kept, size, shape in zip(self._memory, sizes, shapes, strict=True)]

    def clear(self) -> None:
        """Give the memory back."""
        self._memory = []
