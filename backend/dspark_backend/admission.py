"""The queue before the slots: higher priority first, then first come, first served."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from dspark_backend.sequence import SequenceState


class AdmissionQueue:
    """Sequences that wait for a slot."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, SequenceState]] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[SequenceState]:
        return (entry[-1] for entry in self._heap)

    def push(self, sequence: SequenceState) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (-sequence.prepared.request.priority, self._pushed, sequence))

    def head(self) -> SequenceState:
        """The next to be admitted. Raises IndexError where nobody waits."""
        return self._heap[0][-1]

    def pop(self) -> SequenceState:
        return heapq.heappop(self._heap)[-1]

    def remove(self, unwanted: Callable[[SequenceState], bool]) -> None:
        """Drop every sequence for which ``unwanted`` holds."""
        self._heap = [entry for entry in self._heap if not unwanted(entry[-1])]
        heapq.heapify(self._heap)
