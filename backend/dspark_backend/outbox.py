"""What waits to be sent: results of the engine's thread for the thread that talks to the server.

A fast model makes responses faster than the server takes them. Pieces of one sequence that wait together are joined to
one, so that the queue never holds more than a piece a sequence and no answer grows older than a round of sending.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from dspark_backend.delta import Delta
from dspark_backend.errors import DSparkError

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Parcel(Generic[Owner]):
    """One response in the making."""

    owner: Owner
    """The request; hashable."""
    result: list[Delta] | DSparkError
    last: bool
    """Nothing follows for this owner."""


def join(left: Delta, right: Delta) -> Delta:
    """Two consecutive pieces of one sequence as one."""
    return Delta(
        sequence_index=right.sequence_index,
        text=left.text + right.text,
        token_ids=left.token_ids + right.token_ids,
        log_probs=left.log_probs + right.log_probs,
        finish_reason=right.finish_reason,
        usage=right.usage,
    )


def coalesce(parcels: Iterable[Parcel[Owner]]) -> list[Parcel[Owner]]:
    """Join the pieces of each sequence. What was last of its owner stays behind everything else of it."""
    merged: dict[tuple[Owner, int | None], Parcel[Owner]] = {}
    for parcel in parcels:
        result = parcel.result
        single = result[0] if isinstance(result, list) and len(result) == 1 else None
        key = (parcel.owner, None if single is None else single.sequence_index)
        # Taken out and put in anew: the joined piece goes to the end.
        before = merged.pop(key, None)
        if single is not None and before is not None and isinstance(before.result, list):
            parcel = Parcel(parcel.owner, [join(before.result[0], single)], parcel.last)
        merged[key] = parcel
    return list(merged.values())


class Outbox(Generic[Owner]):
    """A queue between two threads that hands out everything that waits, joined."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Parcel[Owner] | None] = queue.SimpleQueue()
        self.closed = False
        """Everything was taken, and nothing follows. Known to the taking thread."""

    def put(self, parcel: Parcel[Owner]) -> None:
        self._queue.put(parcel)

    def close(self) -> None:
        """Nothing follows."""
        self._queue.put(None)

    def take(self, timeout: float) -> list[Parcel[Owner]]:
        """What waits; nothing after ``timeout`` seconds without anything."""
        waiting: list[Parcel[Owner]] = []
        try:
            entry = self._queue.get(timeout=timeout)
            while entry is not None:
                waiting.append(entry)
                entry = self._queue.get_nowait()
            self.closed = True
        except queue.Empty:
            pass
        return coalesce(waiting)
