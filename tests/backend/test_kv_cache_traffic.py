"""Random traffic over the slot cache: every held row stays what was written for its token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_cache import cache_of, check, run

from dspark_backend.errors import DSparkError
from dspark_backend.kv_cache import KvCache, Slot


class Model:
    """Random traffic: what each held slot must contain, and how far it may grow."""

    def __init__(self, cache: KvCache, rng: np.random.Generator) -> None:
        self.cache, self.rng = cache, rng
        self.held: dict[Slot, tuple[list[int], int, bool]] = {}

    def admit(self) -> None:
        rng, cache = self.rng, self.cache
        prompt = self.prompt()
        reserve = min(len(prompt) + int(rng.integers(1, 300)), cache.max_context)
        prompt = prompt[: reserve - 1]
        if not cache.fits(reserve):
            with pytest.raises(DSparkError, match="no room"):
                cache.acquire(reserve)
            return
        slot = cache.acquire(reserve, prompt if rng.random() < 0.8 else ())
        assert slot not in self.held and slot.reserved == reserve
        self.held[slot] = (prompt, reserve, False)

    def prompt(self) -> list[int]:
        # Few distinct beginnings, so that prefixes are shared.
        head = np.random.default_rng(int(self.rng.integers(0, 3))).integers(0, 9, 400)
        return head[: int(self.rng.integers(1, 400))].tolist() + self.rng.integers(0, 9, 3).tolist()

    def advance(self) -> None:
        if not self.held:
            return
        slot = list(self.held)[int(self.rng.integers(0, len(self.held)))]
        prompt, reserve, started = self.held[slot]
        if not started:
            if self.rng.random() < 0.7:
                drafted = bool(self.rng.integers(0, 2))
                hit = self.cache.reuse_prefix(slot, prompt, len(prompt) - 1, with_context=drafted)
                assert not drafted or slot.context_length == hit
                assert hit == slot.length <= len(prompt) - 1
                assert slot.tokens.tolist() == prompt[:hit]
            else:
                slot.truncate(0)
            self.held[slot] = (prompt, reserve, True)
            if slot.length < len(prompt):
                run(self.cache, slot, prompt[slot.length :], with_context=bool(self.rng.integers(0, 2)))
        else:
            room = reserve - slot.length
            if room:
                run(self.cache, slot, self.rng.integers(0, 9, min(room, int(self.rng.integers(1, 60)))).tolist())
        expected = self.held[slot][0]
        assert slot.tokens.tolist()[: len(expected)] == expected

    def leave(self) -> None:
        if self.held:
            slot = list(self.held)[int(self.rng.integers(0, len(self.held)))]
            del self.held[slot]
            (self.cache.scrub if self.rng.random() < 0.1 else lambda _: None)(slot)
            self.cache.release(slot)

    def check(self) -> None:
        check(self.cache)
        assert set(self.cache.active) == set(self.held)
        count = len(self.held)
        if count:
            longest = max(reserve for _, reserve, _ in self.held.values())
            assert count * self.cache._capacity_for(longest) <= self.cache._budget_rows


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([512, 1024, 1536, 4096, 20_000]),
    max_slots=st.sampled_from([1, 3, 8]),
    block_size=st.sampled_from([0, 7]),
)
def test_random_traffic(seed, rows, max_slots, block_size):
    rng = np.random.default_rng(seed)
    model = Model(cache_of(rows, max_slots, block_size=block_size), rng)
    for _ in range(80):
        action = rng.choice([model.admit, model.advance, model.advance, model.leave])
        action()
        model.check()
    while model.held:
        model.leave()
        model.check()
    assert model.cache.active == [] and model.cache.bytes_in_use == 0
