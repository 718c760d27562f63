"""Bound memory that is kept between steps: windows of the cache, places of tokens, arrays of every size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from artifacts import golden_arrays

from dspark_backend.stages import slot_arrays
from dspark_backend.stages.batch import BatchLayout, RowMove, Segment, StepBatch
from dspark_backend.stages.binding import exact_threads
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_backend.stages.slot_arrays import SlotArrays

NAME, SLOTS = "qwen3_vanilla", 13


@pytest.fixture
def stage(golden_artifacts) -> OnnxRuntimeVerifier:
    return OnnxRuntimeVerifier(golden_artifacts[NAME], threads=1)


@pytest.mark.parametrize(
    ("threads", "caches", "expected"),
    [
        (1, [(1, 128)], 1), (2, [(1, 128)], 1), (8, [(8, 128), (4, 256)], 4), (3, [(8, 128)], 3),
        (8, [(1, 16)], 8), (8, [(1, 16), (2, 32)], 2), (0, [(1024, 128)], 0), (0, [(1, 16)], 0),
    ],
)  # fmt: skip
def test_no_more_threads_than_key_heads(threads, caches, expected):
    assert exact_threads(threads, caches) == expected


def test_every_window_after_every_other(stage):
    """More windows than are kept, each bound again after others, over a cache that moves in between."""
    tokens = golden_arrays(NAME)["prompt"].tolist()
    stage.allocate(1, 64, ())
    stage.step(StepBatch.pack([Segment(0, 0, tokens, len(tokens))]))
    expected = stage.step(StepBatch.pack([Segment(0, len(tokens), [7], 0)])).logits[0].tobytes()
    windows = list(itertools.combinations(range(SLOTS), 2))
    assert len(windows) > slot_arrays._MAX_WINDOWS
    stage.allocate(SLOTS, 64, [RowMove(0, 0, len(tokens))])
    for slot in range(1, SLOTS):
        stage.copy_rows(RowMove(0, slot, len(tokens)))
    for round_ in range(2):
        for pair in windows:
            batch = StepBatch.pack([Segment(slot, len(tokens), [7], 0) for slot in pair])
            for row in stage.step(batch).logits:
                assert row.tobytes() == expected, (round_, pair)
        moves = [RowMove(slot, SLOTS - 1 - slot, len(tokens)) for slot in range(SLOTS)]
        stage.allocate(SLOTS, 128, moves)


def test_the_same_lengths_in_other_places(stage):
    """What says where tokens go is not written again while it is the same: other slots or lengths are not."""
    tokens = golden_arrays(NAME)["prompt"].tolist()[:6]
    alone = []
    for _ in range(2):
        stage.allocate(4, 64, ())
        alone.append(stage.step(StepBatch.pack([Segment(0, 0, tokens, 0)])).logits.tobytes())
    assert alone[0] == alone[1]
    stage.allocate(4, 64, ())
    for slots in ((0, 3), (3, 0), (0, 3), (1, 2), (2, 1), (0, 1)):
        batch = StepBatch.pack([Segment(slot, 0, tokens, 0) for slot in slots])
        logits = stage.step(batch).logits
        assert logits[:6].tobytes() == logits[6:].tobytes() == alone[0], slots
        three = StepBatch.pack([Segment(slots[0], 0, tokens[:3], 3), Segment(slots[1], 0, tokens, 0)])
        assert stage.step(three).logits.tobytes() == alone[0], slots


def test_outputs_keep_their_memory(stage):
    """A step of a size seen before allocates nothing of the vocabulary's size."""
    stage.allocate(2, 64, ())
    large = StepBatch.pack([Segment(0, 0, [1, 2, 3, 4], 0), Segment(1, 0, [5, 6], 0)])
    small = StepBatch.pack([Segment(0, 4, [1], 0)])
    first = stage.step(large)
    assert first.logits.shape == (6, stage.artifact.vocab_size)
    for batch in (small, large, small):
        output = stage.step(batch)
        for name in ("logits", "features", "argmax", "top_logit"):
            assert np.shares_memory(getattr(output, name), getattr(first, name)), name


def test_a_freed_cache_is_not_kept():
    cache = SlotArrays([(1, 4)] * 2)
    cache.allocate(4, 8, ())
    first = cache.window([1, 3])
    assert cache.window([3, 1]) is first and (first.first, first.count) == (1, 3)
    old = cache.arrays[0]
    cache.allocate(4, 16, ())
    second = cache.window([1, 3])
    assert second is not first
    assert second.values[0].shape() == [3, 1, 16, 4] and first.values[0].shape() == [3, 1, 8, 4]
    assert not np.shares_memory(old, cache.arrays[0])


def test_a_layout_is_shared_and_cannot_be_written_to():
    batches = [StepBatch.pack([Segment(slot, 5, [1, 2], 0), Segment(7, 9, [3], 1)]) for slot in (0, 4)]
    layout = batches[0].layout
    assert layout is batches[1].layout is BatchLayout.of((2, 1), (0, 1))
    assert layout.columns.tolist() == [0, 1, 0] and layout.segment_of.tolist() == [0, 0, 1]
    assert layout.offsets.tolist() == [0, 2, 3] and layout.longest == 2
    assert layout.logit_rows.tolist() == [0, 1] and layout.logit_offsets.tolist() == [0, 2, 2]
    assert batches[0].positions.tolist() == [5, 6, 9]
    with pytest.raises(ValueError, match="read-only"):
        layout.columns[0] = 1
