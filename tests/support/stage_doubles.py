"""Stages for tests: wrappers of a real one that break it on demand, and one that stores rows and computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from dspark_backend.stages.batch import RowMove, StepBatch, StepOutput


class WrappedStage:
    """A real stage with a hook before and after each step; remembers the batches."""

    def __init__(
        self,
        inner: Any,
        before: Callable[[StepBatch], None] = lambda batch: None,
        after: Callable[[StepBatch, StepOutput], StepOutput] = lambda batch, output: output,
    ) -> None:
        self.inner = inner
        self.before = before
        self.after = after
        self.batches: list[StepBatch] = []
        self.closed = 0

    @property
    def artifact(self) -> Any:
        return self.inner.artifact

    @property
    def lazy_memory(self) -> bool:
        return bool(self.inner.lazy_memory)

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self.inner.allocate(num_slots, capacity, moves)

    def copy_rows(self, move: RowMove) -> None:
        self.inner.copy_rows(move)

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self.inner.clear_rows(slot, first)

    def step(self, batch: StepBatch) -> StepOutput:
        self.batches.append(batch)
        self.before(batch)
        return self.after(batch, self.inner.step(batch))

    def close(self) -> None:
        self.closed += 1
        self.inner.close()


class StorageStage:
    """A stage's storage alone: one number a row, moved as the protocol says. ``write`` stands for a step."""

    def __init__(self, max_context: int = 4096, bytes_per_token: int = 8, block_size: int = 0) -> None:
        self.artifact: Any = SimpleNamespace(
            max_context=max_context, cache_bytes_per_token=bytes_per_token, block_size=block_size
        )
        self.rows = np.zeros((0, 0))
        self.allocations = 0
        self.copied: list[RowMove] = []

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self.allocations += 1
        fresh = np.zeros((num_slots, capacity))
        assert len({move.target for move in moves}) == len(moves)
        for move in moves:
            assert move.length <= capacity
            fresh[move.target, : move.length] = self.rows[move.source, : move.length]
        self.rows = fresh

    def copy_rows(self, move: RowMove) -> None:
        self.copied.append(move)
        self.rows[move.target, : move.length] = self.rows[move.source, : move.length]

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self.rows[slot, first:] = 0

    def write(self, slot: int, start: int, values: Sequence[float]) -> None:
        assert start + len(values) <= self.rows.shape[1], "a step beyond the capacity"
        self.rows[slot, start : start + len(values)] = values

    def step(self, batch: StepBatch) -> StepOutput:
        raise NotImplementedError("storage only")

    def close(self) -> None:
        self.rows = np.zeros((0, 0))
