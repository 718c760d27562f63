"""Where the tokens of a step go: the index inputs of the engines, in plain numpy.

Every array has the rounded sizes of a :class:`~dspark_backend.stages.tensorrt.profiles.Choice`. Tokens and requests
that fill it up to them compute something that nobody reads; cache rows that take no part write into the padding.
Columns behind a request's own rows repeat its last one: what is not finite there must not reach other requests.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import InternalError
from dspark_backend.stages.batch import IntArray, StepBatch
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch

Arrays = MutableMapping[str, NDArray[Any]]


@dataclass(frozen=True)
class View:
    """Neighbouring cache rows: slots first .. first + count - 1."""

    first: int
    count: int

    @classmethod
    def over(cls, slots: IntArray, count: int, num_slots: int) -> View:
        """``count`` rows that hold all of ``slots``, within the ``num_slots`` that there are."""
        return cls(min(int(slots.min()), num_slots - count), count)


def span(slots: IntArray) -> int:
    """Rows from the first to the last of some slots."""
    return int(slots.max() - slots.min()) + 1


def fill_verifier(arrays: Arrays, batch: StepBatch, view: View, sizes: Mapping[str, int], capacity: int) -> None:
    """Inputs of ``verifier.engine`` but for ``key_positions``, caches and weights."""
    layout, tokens = batch.layout, batch.num_tokens
    starts = batch.positions[layout.offsets[:-1]]
    _check_room(starts, sizes["Q"], capacity)
    rows = batch.slots[layout.segment_of] - view.first
    for name, values in (
        ("input_ids", batch.token_ids),
        ("positions", batch.positions),
        ("rows", rows),
        ("columns", layout.columns),
        ("logit_rows", layout.logit_rows),
    ):
        arrays[name][: len(values)] = values
        arrays[name][len(values) :] = 0
    query_index, write_starts = arrays["query_index"], arrays["write_starts"]
    query_index[:] = 0
    query_index[batch.slots - view.first] = (layout.offsets[1:] - 1)[:, None]
    query_index[rows, layout.columns] = np.arange(tokens)
    write_starts[:] = capacity - sizes["Q"]
    write_starts[batch.slots - view.first] = starts


def fill_context(arrays: Arrays, context: ContextRows, view: View, sizes: Mapping[str, int], capacity: int) -> None:
    """Index inputs of ``context.engine``, and those that ``draft.engine`` has in common with it."""
    count = context.num_rows
    arrays["context_positions"][:count] = context.positions
    arrays["context_positions"][count:] = 0
    update_index, write_starts = arrays["update_index"], arrays["write_starts"]
    update_index[:] = 0
    write_starts[:] = capacity - sizes["W"]
    for slot in np.unique(context.slots).tolist():
        places = np.flatnonzero(context.slots == slot)
        positions = context.positions[places]
        if (np.diff(positions) != 1).any():
            raise InternalError(f"context of slot {slot}: expected consecutive positions, got {positions.tolist()}")
        _check_room(positions[:1], sizes["W"], capacity)
        update_index[slot - view.first] = places[-1]
        update_index[slot - view.first, : len(places)] = places
        write_starts[slot - view.first] = positions[0]


def fill_draft(arrays: Arrays, batch: DraftBatch, view: View, sizes: Mapping[str, int], capacity: int) -> None:
    """Inputs of ``draft.engine`` but for features, ``key_positions``, caches and weights."""
    fill_context(arrays, batch.context, view, sizes, capacity)
    count, block = batch.uniforms.shape
    for name, values, filler in (
        ("anchors", batch.anchors, 0),
        ("block_rows", batch.slots - view.first, 0),
        ("starts", batch.starts, 0),
        ("uniforms", batch.uniforms, 0),
        ("temperature", batch.temperature, 1),
        ("top_k", batch.top_k, 1),
        ("top_p", batch.top_p, 1),
        ("min_p", batch.min_p, 0),
    ):
        arrays[name][:count] = values
        arrays[name][count:] = filler
    arrays["query_index"][:] = 0
    for place, (slot, start) in enumerate(zip(batch.slots.tolist(), batch.starts.tolist(), strict=True)):
        row = slot - view.first
        held = int((batch.context.slots == slot).sum())
        if held and int(arrays["write_starts"][row]) + held != start:
            raise InternalError(f"block of slot {slot}: expected it right behind its context, got position {start}")
        if not held:
            _check_room(batch.starts[place : place + 1], sizes["W"], capacity)
            arrays["write_starts"][row] = start
        drafted = place * block + np.arange(block)
        arrays["update_index"][row, held:] = sizes["M"] + drafted[-1]
        arrays["update_index"][row, held : held + block] = sizes["M"] + drafted
        arrays["query_index"][row] = drafted


def rows_per_slot(slots: IntArray) -> int:
    """Most context rows of one slot; 0 where there is none."""
    return int(np.unique(slots, return_counts=True)[1].max()) if len(slots) else 0


def pieces(context: ContextRows, most: int, most_each: int) -> Sequence[slice]:
    """Runs of context rows, in order, of at most ``most`` rows and ``most_each`` of one slot."""
    found, start = [], 0
    counts: dict[int, int] = {}
    for place, slot in enumerate(context.slots.tolist()):
        if place - start == most or counts.get(slot, 0) == most_each:
            found.append(slice(start, place))
            start, counts = place, {}
        counts[slot] = counts.get(slot, 0) + 1
    return [*found, slice(start, context.num_rows)]


def _check_room(starts: IntArray, width: int, capacity: int) -> None:
    """A request's rows are followed by others that are written over later: those must lie in the cache, too."""
    if int(starts.max()) + width > capacity:
        raise InternalError(
            f"cache: expected room for {width} rows behind position {int(starts.max())}, there are {capacity} in all; "
            "build the engine for a longer context"
        )
