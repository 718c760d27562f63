"""CUDA graphs by what a step looks like: captured at the second sight, the least recently used ones forgotten."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class GraphKey:
    """All that is frozen into a graph: shapes, and addresses that move with the view of the cache."""

    profile: int
    sizes: tuple[tuple[str, int], ...]
    first: int
    """Slot where the view begins."""

    @classmethod
    def of(cls, profile: int, sizes: Mapping[str, int], first: int) -> GraphKey:
        return cls(profile, tuple(sorted(sizes.items())), first)


class GraphCache(Generic[Entry]):
    """At most ``limit`` entries. ``forget`` is called with each that goes."""

    def __init__(self, limit: int, forget: Callable[[Entry], Any]) -> None:
        self._limit = limit
        self._forget = forget
        self._entries: OrderedDict[GraphKey, Entry] = OrderedDict()
        self._seen: OrderedDict[GraphKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: GraphKey) -> Entry | None:
        """The entry, which counts as used now."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def worth_capturing(self, key: GraphKey) -> bool:
        """Whether this key came up lately: most prompts' ends never do again."""
        known = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > 4 * self._limit:
            self._seen.popitem(last=False)
        return known

    def put(self, key: GraphKey, entry: Entry) -> None:
        """Keep an entry; the least recently used one goes where there are too many."""
        self._entries[key] = entry
        if len(self._entries) > self._limit:
            self._forget(self._entries.popitem(last=False)[1])

    def clear(self) -> None:
        """All go: addresses have changed."""
        while self._entries:
            self._forget(self._entries.popitem()[1])
        self._seen.clear()
