"""The slot cache, on a storage that moves real rows: every held row must be what was written for its token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_cache import cache_of, check, run, storage

from dspark_backend.errors import DSparkError
from dspark_backend.kv_cache import capacity_for, common_prefix


@pytest.mark.parametrize(
    ("length", "capacity"),
    [
        (0, 128),
        (1, 128),
        (128, 128),
        (129, 192),
        (512, 512),
        (513, 640),
        (1024, 1024),
        (1025, 1536),
        (4096, 4096),
        (4097, 5120),
    ],
)
def test_capacity_steps(length, capacity):
    assert capacity_for(length) == capacity


@given(st.integers(1, 20_000))
def test_capacity_holds_and_grows(length):
    assert length <= capacity_for(length) <= capacity_for(length + 1)


def test_common_prefix():
    def count(left: list[int], right: list[int]) -> int:
        return common_prefix(np.array(left, dtype=np.int64), np.array(right, dtype=np.int64))

    assert count([], [1]) == 0
    assert count([1, 2, 3], [1, 2, 4]) == 2
    assert count([1, 2], [1, 2, 3]) == 2
    assert count([9, 2], [1, 2]) == 0


def test_a_short_step_keeps_the_rows_of_longer_sequences():
    """A step of short sequences alone must not shrink the cache under the others."""
    cache = cache_of(4096)
    long, short = cache.acquire(400), cache.acquire(20)
    run(cache, long, list(range(300)))
    run(cache, short, [1, 2, 3])
    assert long.length == 300 and cache.capacity == 320
    check(cache)


def test_old_rows_never_block_admission():
    """A slot whose last owner was long must not hold the capacity up for a short new one."""
    cache = cache_of(1024, max_slots=4, max_context=1024)
    first = cache.acquire(1000)
    run(cache, first, [7] * 1000)
    cache.release(first)
    slots = [cache.acquire(100) for _ in range(4)]
    assert len(set(slots)) == 4
    check(cache)


def test_capacity_grows_and_shrinks_with_the_sequences():
    cache = cache_of(100_000)
    slot = cache.acquire(2000)
    seen = []
    for _ in range(20):
        run(cache, slot, [1] * 100)
        seen.append(cache.capacity)
    assert seen == sorted(seen) and seen[0] == 128 and seen[-1] == 2048
    cache.release(slot)
    again = cache.acquire(10)
    assert cache.reuse_prefix(again, [9, 9], 1) == 0
    run(cache, again, [1])
    assert cache.capacity == 128
    check(cache)


def test_growth_is_rare():
    cache = cache_of(100_000)
    slot = cache.acquire(1024)
    before = storage(cache).allocations
    for _ in range(1024):
        run(cache, slot, [1])
    assert storage(cache).allocations - before == 10


@pytest.mark.parametrize("kept", [(7,), (0, 7), (2, 3, 6), (1, 2, 4, 5, 7), (3, 4, 5)])
def test_scattered_sequences_are_brought_together(kept):
    """No idle slot between the first and the last in use, step after step, and no row is copied without need."""
    cache = cache_of(4096, max_slots=8)
    slots = [cache.acquire(50) for _ in range(8)]
    for number, slot in enumerate(slots):
        run(cache, slot, [number] * 10)
    for number in set(range(8)) - set(kept):
        cache.release(slots[number])
    width = kept[-1] - kept[0] + 1
    for step in range(3):
        for number in kept:
            run(cache, slots[number], [step])
        indices = [slot.index for slot in cache.active]
        assert indices == list(range(kept[0], kept[0] + len(kept)))
        check(cache)
    for number in kept:
        assert slots[number].tokens.tolist() == [number] * 10 + [0, 1, 2]
    assert (len(storage(cache).copied) > 0) == (width > len(kept))
    assert len(storage(cache).copied) < len(kept)


def test_budget_of_slots_and_rows():
    cache = cache_of(512, max_slots=8)
    assert cache.max_context == 512
    assert cache.fits(512) and not cache.fits(513)
    cache.acquire(128)
    cache.acquire(128)
    assert cache.fits(128) and not cache.fits(200)
    cache.acquire(1)
    cache.acquire(1)
    assert not cache.fits(1)
    limited = cache_of(100_000, max_slots=2)
    limited.acquire(1)
    limited.acquire(1)
    assert not limited.fits(1)


@pytest.mark.parametrize(
    ("rows", "setting", "model", "expected"),
    [(100_000, 0, 4096, 4096), (100_000, 300, 4096, 300), (1300, 0, 4096, 1024), (130, 0, 4096, 128)],
)
def test_max_context(rows, setting, model, expected):
    assert cache_of(rows, max_context=setting, model_context=model).max_context == expected


def test_budget_too_small():
    with pytest.raises(DSparkError, match="kv_budget_mib: expected room for at least one sequence"):
        cache_of(127)


class TestReuse:
    PROMPT = tuple(range(100, 140))

    def test_from_a_running_sequence(self):
        cache = cache_of(4096)
        first, second = cache.acquire(60), cache.acquire(60)
        run(cache, first, [*self.PROMPT, 1, 2])
        assert cache.reuse_prefix(second, [*self.PROMPT, 9], 40) == 40
        check(cache)
        assert first.length == 42

    def test_in_place_without_a_copy(self):
        cache = cache_of(4096)
        first = cache.acquire(60)
        run(cache, first, list(self.PROMPT))
        cache.release(first)
        again = cache.acquire(60, self.PROMPT)
        assert again is first
        assert cache.reuse_prefix(again, self.PROMPT, 39) == 39
        assert storage(cache).copied == []
        check(cache)

    def test_the_longest_match_wins(self):
        cache = cache_of(4096)
        slots = [cache.acquire(60) for _ in range(3)]
        run(cache, slots[0], list(self.PROMPT[:10]))
        run(cache, slots[1], list(self.PROMPT[:30]))
        assert cache.reuse_prefix(slots[2], self.PROMPT, 39) == 30
        assert [(move.source, move.length) for move in storage(cache).copied] == [(slots[1].index, 30)]

    def test_limit(self):
        cache = cache_of(4096)
        first, second = cache.acquire(60), cache.acquire(60)
        run(cache, first, list(self.PROMPT))
        assert cache.reuse_prefix(second, self.PROMPT, 5) == 5

    def test_too_short_to_be_worth_it(self):
        cache = cache_of(4096)
        first, second = cache.acquire(60), cache.acquire(60)
        run(cache, first, list(self.PROMPT[:3]))
        assert cache.reuse_prefix(second, self.PROMPT, 39) == 0
        assert second.length == 0

    def test_scrubbed_rows_are_gone_and_the_others_stay(self):
        cache = cache_of(4096)
        first, second = cache.acquire(60), cache.acquire(60)
        run(cache, first, list(self.PROMPT))
        run(cache, second, [5] * 20)
        cache.scrub(first)
        assert not storage(cache).rows[first.index].any()
        assert second.tokens.tolist() == [5] * 20
        cache.release(first)
        third = cache.acquire(60)
        assert cache.reuse_prefix(third, self.PROMPT, 39) == 0
        check(cache)

    def test_conversations_in_turn_keep_their_rows(self):
        """The lowest place is taken by each of them, and what stood there goes to where the oldest rows are."""
        cache = cache_of(4096, max_slots=4)
        texts = [[number] * 20 for number in range(3)]
        for turn in range(4):
            for text in texts:
                prompt = [*text, 7]
                slot = cache.acquire(100, prompt)
                hit = cache.reuse_prefix(slot, prompt, len(prompt) - 1)
                assert slot.index == 0 and hit == (20 + 10 * (turn - 1) if turn else 0)
                text += [turn + 50] * 10 if turn else []
                run(cache, slot, [*text[hit:]])
                check(cache)
                cache.release(slot)

    def test_the_oldest_rows_go_first(self):
        cache = cache_of(4096, max_slots=3)
        for number in (1, 2, 3, 4):
            slot = cache.acquire(100, [number] * 20)
            run(cache, slot, [number] * 20)
            cache.release(slot)
        assert sorted(int(slot.tokens[0]) for slot in cache._slots) == [2, 3, 4]
        check(cache)

    def test_a_short_common_beginning_does_not_cost_a_conversation(self):
        cache = cache_of(4096)
        slot = cache.acquire(200, self.PROMPT)
        run(cache, slot, [*self.PROMPT, *[1] * 60])
        cache.release(slot)
        other = cache.acquire(60, [*self.PROMPT, 2])
        assert cache.reuse_prefix(other, [*self.PROMPT, 2], 40) == 40
        cache.release(other)
        again = cache.acquire(200, [*self.PROMPT, *[1] * 60, 3])
        assert cache.reuse_prefix(again, [*self.PROMPT, *[1] * 60, 3], 100) == 100
        check(cache)

    def test_what_is_brought_together_keeps_rows_of_those_that_are_gone(self):
        cache = cache_of(4096)
        slots = [cache.acquire(60) for _ in range(3)]
        for number, slot in enumerate(slots):
            run(cache, slot, [number] * 20)
        cache.release(slots[1])
        run(cache, slots[0], [0])
        assert {slot.index for slot in cache.active} == {0, 1}
        assert sorted(int(slot.tokens[0]) for slot in cache._slots if slot.length) == [0, 1, 2]
        check(cache)

    def test_nothing_is_copied_where_nothing_is_reused(self):
        cache = cache_of(4096, keep_rows=False)
        for number in range(4):
            slot = cache.acquire(60, [number] * 20)
            slot.truncate(0)
            run(cache, slot, [number] * 20)
            cache.release(slot)
        assert storage(cache).copied == []

    def test_the_latest_rows_survive_a_reallocation(self):
        cache = cache_of(1024, max_slots=8)
        slots = [cache.acquire(100) for _ in range(8)]
        for number, slot in enumerate(slots):
            run(cache, slot, [number] * 50)
        for slot in slots:
            cache.release(slot)
        # Twice the capacity leaves four slots: the new sequence's and the three freed last.
        grown = cache.acquire(200)
        cache.reuse_prefix(grown, [99] * 200, 199)
        run(cache, grown, [99] * 200)
        kept = sorted(int(slot.tokens[0]) for slot in cache._slots if slot.free and slot.length)
        assert kept == [5, 6, 7]
        check(cache)


def test_reset():
    cache = cache_of(4096)
    slot = cache.acquire(600)
    run(cache, slot, [1] * 500)
    cache.reset()
    assert cache.active == [] and cache.capacity == 128 and not storage(cache).rows.any()
    check(cache)


def test_integrity_finds_broken_bookkeeping():
    cache = cache_of(4096)
    slot = cache.acquire(10)
    run(cache, slot, [1] * 10)
    slot.commit([1])
    with pytest.raises(DSparkError, match="holds 11 rows, more than it may"):
        cache.check_integrity()
    slot.truncate(5)
    cache.check_integrity()
    slot.index = 1
    with pytest.raises(DSparkError, match="not a permutation"):
        cache.check_integrity()
