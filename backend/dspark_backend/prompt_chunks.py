"""How much of the waiting prompts a step reads, and which of them share one run of the verifier."""

from __future__ import annotations

from collections.abc import Sequence

_PADDING = 2
"""Padded rows of attention for each that counts, at most, where prompts share a run."""


def chunk_budget(prompts: int, streams: bool, chunk: int, busy_chunk: int) -> int:
    """Most prompt tokens of a step while so many requests wait for their prompts: never above ``chunk``, for which
    engines are built.

    Beside streams a prompt may slow them by ``busy_chunk`` tokens. Each further prompt that waits adds as much, up to
    ``chunk``: with a fixed one the slots of a full server fill with prompts that wait for each other, and few decode.
    """
    return min(chunk, prompts * busy_chunk) if streams else chunk


def neighbours(slots: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut pieces of prompts, given by slot and number of tokens, into runs: lists of places, those of near slots.

    Attention computes every cache row from the first slot of a run to the last, as far as its longest piece: two
    prompts at the ends of a cache of 64 slots would take 32 times the work of the same two beside each other.
    """
    runs: list[list[int]] = []
    tokens = 0
    for place in sorted(range(len(slots)), key=lambda each: slots[each]):
        tokens += lengths[place]
        run = [*runs[-1], place] if runs else [place]
        span = slots[place] - slots[run[0]] + 1
        if runs and span * max(lengths[each] for each in run) <= _PADDING * tokens:
            runs[-1] = run
        else:
            runs.append([place])
            tokens = lengths[place]
    return runs
