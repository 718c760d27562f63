"""Slots of the key/value cache: who holds one, how long the cache is, what of an old prompt can be used again.

The cache is one block of ``num_slots`` x ``capacity`` rows in the stage. Attention costs what the longest sequence in
view costs, so the capacity follows the sequences that are really there, in steps; and sequences are kept in
neighbouring slots. Memory is promised at admission, for the whole length that a sequence may reach: nothing is ever
evicted midway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import DSparkError
from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.protocol import DrafterStage, VerifierStage

_MIN_REUSE = 4
"""Fewer cached tokens than this are not worth copying."""


def capacity_for(length: int) -> int:
    """Rows to hold ``length`` tokens, in steps that grow from 64: attention computes all of them in every step, and
    growing copies them once."""
    length = max(length, 128)
    step = 64 if length <= 512 else 128 if length <= 1024 else 512 if length <= 4096 else 1024
    return -(-length // step) * step


@dataclass(eq=False)
class Slot:
    """A place in the cache. ``index`` changes when sequences are moved together: read it anew each step."""

    index: int
    reserved: int = 0
    """Tokens promised to the sequence that holds it; 0 where it is free."""
    released: int = 0
    """When it was freed, on the cache's own clock: the latest are kept longest. 0 where another slot has its rows, too.
    """
    context_length: int = 0
    """Rows, at most ``length``, that the drafter's cache holds, too."""
    _tokens: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    _length: int = 0

    @property
    def free(self) -> bool:
        return self.reserved == 0

    @property
    def length(self) -> int:
        """Valid rows: tokens whose keys and values are in the cache."""
        return self._length

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens of the valid rows, int64 [length]: a view."""
        return self._tokens[: self._length]

    def commit(self, token_ids: Sequence[int]) -> None:
        """Rows length .. length+n-1 now hold these tokens."""
        end = self._length + len(token_ids)
        if end > len(self._tokens):
            grown = np.empty(capacity_for(end), dtype=np.int64)
            grown[: self._length] = self.tokens
            self._tokens = grown
        self._tokens[self._length : end] = token_ids
        self._length = end

    def truncate(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        self._length = min(self._length, length)
        self.context_length = min(self.context_length, self._length)


def common_prefix(left: NDArray[np.int64], right: NDArray[np.int64]) -> int:
    """Tokens at the start that two sequences share."""
    count = min(len(left), len(right))
    different = np.flatnonzero(left[:count] != right[:count])
    return int(different[0]) if different.size else count


class KvCache:
    """Slots over the caches of both stages: the drafter's rows and the verifier's live and die together.

    Raises:
        DSparkError: the budget does not hold even one sequence of two tokens.
    """

    def __init__(
        self,
        stage: VerifierStage,
        max_slots: int,
        budget_bytes: int,
        max_context: int = 0,
        drafter: DrafterStage | None = None,
        keep_rows: bool = True,
    ) -> None:
        """``keep_rows``: of sequences that are gone, for later ones to reuse; else nothing is copied to keep them."""
        self._stages: list[VerifierStage | DrafterStage] = [stage]
        # A block of drafts sits behind the last committed row.
        self._margin = 0
        if drafter is not None:
            self._stages.append(drafter)
            self._margin = drafter.artifact.block_size
        self._bytes_per_row = sum(each.artifact.cache_bytes_per_token for each in self._stages)
        self._budget_rows = budget_bytes // self._bytes_per_row
        self.max_context = min(self._longest_within_budget(), stage.artifact.max_context)
        if max_context:
            self.max_context = min(self.max_context, max_context)
        if self.max_context < 2:
            raise DSparkError(
                f"kv_budget_mib: expected room for at least one sequence ({self._capacity_for(2)} rows of "
                f"{self._bytes_per_row} bytes), got {budget_bytes} bytes"
            )
        self._max_slots = max_slots
        self._keep_rows = keep_rows
        self._clock = 0
        self.capacity = 0
        self._slots: list[Slot] = []
        self._reallocate(self._capacity_for(2))

    def _capacity_for(self, length: int) -> int:
        """Rows of a slot that holds ``length`` tokens, and a block of drafts behind them."""
        return capacity_for(length + self._margin)

    def _longest_within_budget(self) -> int:
        length = self._budget_rows
        while length > 0 and self._capacity_for(length) > self._budget_rows:
            length -= 1
        return length

    @property
    def active(self) -> list[Slot]:
        """Slots in use, by index."""
        return sorted((slot for slot in self._slots if not slot.free), key=lambda slot: slot.index)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the rows that hold committed tokens of running sequences."""
        return sum(slot.length for slot in self.active) * self._bytes_per_row

    def fits(self, reserve: int) -> bool:
        """Whether a sequence that may grow to ``reserve`` tokens can be admitted now."""
        active = self.active
        longest = max([reserve, *(slot.reserved for slot in active)])
        count = len(active) + 1
        return count <= self._max_slots and count * self._capacity_for(longest) <= self._budget_rows

    def acquire(self, reserve: int, prompt: Sequence[int] = ()) -> Slot:
        """A free slot for a sequence of at most ``reserve`` tokens that begins with ``prompt``, at the lowest index.

        Call only where ``fits``. Its old rows stay readable until the first step writes over them, or ``reuse_prefix``.
        """
        if not self.fits(reserve):
            raise DSparkError(f"cache: no room for {reserve} tokens; admission must ask first")
        free = [slot for slot in self._slots if slot.free]
        if not free:
            # Fewer slots than the budget allows: the block is still as long as sequences that are gone.
            self._reallocate(self._capacity_for(max([1, *(held.length for held in self.active)])))
            free = [slot for slot in self._slots if slot.free]
        slot = self._vacated(min(free, key=lambda candidate: candidate.index), prompt)
        slot.reserved = reserve
        # Rows beyond what was promised must not hold the capacity up.
        slot.truncate(reserve)
        return slot

    def _vacated(self, slot: Slot, prompt: Sequence[int] = ()) -> Slot:
        """The slot at a free slot's place, whose rows may be overwritten by a sequence that begins with ``prompt``.

        It itself where at least half of its rows are the prompt's or nothing else is older; else the one of all that
        was released longest ago, which changes places with it. Not the one that the prompt continues.
        """
        if not self._keep_rows or slot.length < _MIN_REUSE:
            return slot
        wanted = np.asarray(prompt, dtype=np.int64)
        if 2 * common_prefix(slot.tokens, wanted) >= slot.length:
            return slot
        needed, _ = self._longest_prefix(slot, wanted, with_context=False)
        others = (other for other in self._slots if other.free and (other is slot or other is not needed))
        oldest = min(others, key=lambda other: (other.length >= _MIN_REUSE, other.released))
        if oldest is not slot:
            self._copy_rows(RowMove(slot.index, oldest.index, slot.length))
            oldest.truncate(0)
            slot.index, oldest.index = oldest.index, slot.index
        return oldest

    def reuse_prefix(self, slot: Slot, token_ids: Sequence[int], limit: int, with_context: bool = False) -> int:
        """Fill a new sequence's slot with cached rows of the same beginning, at most ``limit``. Returns how many.

        ``with_context``: only rows that the drafter's cache holds, too.
        """
        wanted = np.asarray(token_ids[:limit], dtype=np.int64)
        best, length = self._longest_prefix(slot, wanted, with_context)
        if length < _MIN_REUSE:
            slot.truncate(0)
            return 0
        if best is slot:
            slot.truncate(length)
        else:
            self._copy_rows(RowMove(best.index, slot.index, length))
            if best.free and length == best.length:
                best.released = 0
            slot.truncate(0)
            slot.commit(best.tokens[:length].tolist())
            slot.context_length = min(length, best.context_length)
        return length

    def lacks_context(self, slot: Slot, token_ids: Sequence[int], limit: int) -> Slot | None:
        """The slot from which ``reuse_prefix`` with context would take more if the drafter's cache held its rows, too;
        None where there is none.
        """
        wanted = np.asarray(token_ids[:limit], dtype=np.int64)
        best, length = self._longest_prefix(slot, wanted, with_context=False)
        # Mostly there is nothing to reuse, or nothing is lacking: the slots are not gone through again then.
        if length < _MIN_REUSE or best.context_length >= length:
            return None
        return best if length > self._longest_prefix(slot, wanted, with_context=True)[1] else None

    def _longest_prefix(self, slot: Slot, wanted: NDArray[np.int64], with_context: bool) -> tuple[Slot, int]:
        """The slot that shares most tokens with ``wanted`` at its beginning, and how many."""
        best, length = slot, 0
        for candidate in self._slots:
            shared = common_prefix(candidate.tokens, wanted)
            if with_context:
                shared = min(shared, candidate.context_length)
            # A match in the slot itself costs no copy, so it wins a tie.
            if shared > length or (shared == length and candidate is slot):
                best, length = candidate, shared
        return best, length

    def release(self, slot: Slot) -> None:
        """The sequence is gone; its rows stay for reuse until somebody else needs the place."""
        self._clock += 1
        slot.reserved = 0
        slot.released = self._clock

    def scrub(self, slot: Slot, first: int = 0) -> None:
        """Forget the rows of a slot from ``first`` on in memory, too: a NaN among them would reach whatever attends to
        this slot later, through the mask.
        """
        slot.truncate(first)
        for stage in self._stages:
            stage.clear_rows(slot.index, first)

    def reset(self) -> None:
        """Begin anew with an empty block, whatever state a failed step left. Call only where nobody holds a slot."""
        self._slots = []
        self._reallocate(self._capacity_for(2))

    def prepare(self, length: int) -> None:
        """Make room for positions below ``length`` and bring the sequences together. Call before a step.

        ``length`` speaks for the sequences of the step; the others keep what they have.
        """
        longest = max([length, *(slot.length for slot in self.active)])
        # A step asks twice, before it drafts and with its drafts: what shrinks for the one must not grow for the other.
        needed, with_drafts = self._capacity_for(longest), self._capacity_for(longest + self._margin)
        if needed > self.capacity:
            self._reallocate(needed)
            return
        if 2 * with_drafts <= self.capacity:
            self._reallocate(with_drafts)
            return
        active = self.active
        # A step attends over all slots from the first to the last in use. An idle one among them costs as much in every
        # step as copying its neighbour's rows there costs once in two or three steps.
        while active and active[-1].index - active[0].index >= len(active):
            inside = range(active[0].index, active[-1].index)
            hole = self._vacated(
                min((slot for slot in self._slots if slot.free and slot.index in inside), key=lambda slot: slot.index)
            )
            self._copy_rows(RowMove(active[-1].index, hole.index, active[-1].length))
            hole.truncate(0)
            hole.index, active[-1].index = active[-1].index, hole.index
            active = self.active

    def check_integrity(self) -> None:
        """Raise DSparkError unless the bookkeeping is consistent. Cheap; called when the engine is idle."""
        indices = sorted(slot.index for slot in self._slots)
        if indices != list(range(len(self._slots))):
            raise DSparkError(f"cache: slot indices are not a permutation: {indices}")
        for slot in self._slots:
            if slot.length > self.capacity or (not slot.free and slot.length > slot.reserved):
                raise DSparkError(f"cache: slot {slot.index} holds {slot.length} rows, more than it may")

    def _copy_rows(self, move: RowMove) -> None:
        for stage in self._stages:
            stage.copy_rows(move)

    def _reallocate(self, capacity: int) -> None:
        """A new block: running sequences first, then the most recently used rows that still fit."""
        held = self.active
        kept = sorted((slot for slot in self._slots if slot.free and slot.length), key=lambda slot: -slot.released)
        count = max(min(self._max_slots, self._budget_rows // capacity), len(held), 1)
        chosen = (held + kept)[:count]
        for slot in chosen:
            slot.truncate(capacity)
        moves = [RowMove(slot.index, index, slot.length) for index, slot in enumerate(chosen) if slot.length]
        for stage in self._stages:
            stage.allocate(count, capacity, moves)
        for index, slot in enumerate(chosen):
            slot.index = index
        self._slots = chosen + [Slot(index) for index in range(len(chosen), count)]
        self.capacity = capacity
