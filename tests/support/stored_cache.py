"""A slot cache over storages that move real rows, and the check that every row is what was written."""

from __future__ import annotations

from stage_doubles import StorageStage

from dspark_backend.kv_cache import KvCache, Slot

BYTES = 8
"""Of a row of the verifier's storage; the drafter's has as many."""


def cache_of(
    rows: int,
    max_slots: int = 4,
    max_context: int = 0,
    model_context: int = 4096,
    block_size: int = 0,
    keep_rows: bool = True,
) -> KvCache:
    """A cache whose budget holds ``rows`` rows; with a drafter where there is a block size."""
    drafter = StorageStage(model_context, BYTES, block_size) if block_size else None
    budget = rows * BYTES * (2 if drafter else 1)
    return KvCache(StorageStage(model_context, BYTES), max_slots, budget, max_context, drafter, keep_rows)


def storage(cache: KvCache) -> StorageStage:
    """The verifier's storage."""
    return cache._stages[0]


def value(token: int, position: int) -> float:
    """What a storage holds for a token: depends on the position, as keys do."""
    return token * 10_000.0 + position


def run(cache: KvCache, slot: Slot, tokens: list[int], with_context: bool = True) -> None:
    """A step: prepare, write, commit; the drafter follows unless told not to."""
    cache.prepare(slot.length + len(tokens))
    start = slot.length
    values = [value(token, start + i) for i, token in enumerate(tokens)]
    storage(cache).write(slot.index, start, values)
    slot.commit(tokens)
    for drafter in cache._stages[1:]:
        if with_context and slot.context_length == start:
            drafter.write(slot.index, start, values)
            slot.context_length = slot.length
            # A block of drafts sits behind the committed rows for a round.
            drafter.write(slot.index, slot.length, [-1.0] * drafter.artifact.block_size)


def check(cache: KvCache) -> None:
    """Every row that counts is the one that was written, in memory that the budget allows."""
    cache.check_integrity()
    for stage in cache._stages:
        assert stage.rows.shape == (len(cache._slots), cache.capacity)
        assert stage.rows.size <= cache._budget_rows
    for slot in cache._slots:
        expected = [value(token, position) for position, token in enumerate(slot.tokens.tolist())]
        assert storage(cache).rows[slot.index, : slot.length].tolist() == expected
        assert slot.context_length <= slot.length
        for drafter in cache._stages[1:]:
            assert drafter.rows[slot.index, : slot.context_length].tolist() == expected[: slot.context_length]
