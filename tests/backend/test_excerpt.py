"""Prompts run over a smaller cache: the same bits as over the whole one, and nobody else's rows touched."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_backend.stages import excerpt
from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

NAME, SLOTS, CAPACITY = "qwen3_vanilla", 5, 320


@pytest.fixture
def stage(golden_artifacts):
    made = OnnxRuntimeVerifier(golden_artifacts[NAME], threads=1)
    made.allocate(SLOTS, CAPACITY, ())
    return made


def tokens(count, seed):
    return np.random.default_rng(seed).integers(0, 100, count).tolist()


def pieces(*parts):
    """Segments of (slot, start, count), all logits wanted."""
    return StepBatch.pack([Segment(slot, start, tokens(count, 10 * slot + start), 0) for slot, start, count in parts])


def results(stage, batch):
    out = stage.step(batch)
    return out.logits.tobytes(), np.asarray(out.features).tobytes(), [array.copy() for array in stage._cache.arrays]


def never(monkeypatch):
    monkeypatch.setattr(excerpt, "_COPIED", 0)


@pytest.mark.parametrize(
    "steps",
    [
        [pieces((0, 0, 40))],
        [pieces((3, 0, 100), (1, 0, 37))],
        [pieces((2, 0, 64)), pieces((2, 64, 60))],
        [pieces((4, 0, 40), (0, 0, 90)), pieces((0, 90, 38), (4, 40, 50)), pieces((0, 128, 1), (4, 90, 2))],
    ],
)
def test_same_bits_and_rows(stage, monkeypatch, steps):
    used = []
    made = excerpt.Excerpts.of
    monkeypatch.setattr(excerpt.Excerpts, "of", lambda self, batch: used.append(made(self, batch)) or used[-1])
    narrow = [results(stage, batch) for batch in steps]
    assert used[0] is not None
    stage.allocate(SLOTS, CAPACITY, ())
    never(monkeypatch)
    whole = [results(stage, batch) for batch in steps]
    assert used[-1] is None
    for mine, other in zip(narrow, whole, strict=True):
        assert mine[:2] == other[:2]
        assert all(np.array_equal(*arrays) for arrays in zip(mine[2], other[2], strict=True))


def test_what_the_memory_held_does_not_show(stage):
    stage.step(pieces((1, 0, 100), (2, 0, 90)))
    expected = results(stage, pieces((0, 0, 40)))
    for kept in stage._excerpts._memory:
        kept.fill(np.nan)
    found = results(stage, pieces((0, 0, 40)))
    assert found[:2] == expected[:2]
    assert all(np.isfinite(array).all() for array in found[2])


def test_rows_of_others_stay(stage):
    stage.step(pieces((1, 0, 9)))
    before = [array[1].copy() for array in stage._cache.arrays]
    stage.step(pieces((0, 0, 80), (2, 0, 70)))
    for array, row in zip(stage._cache.arrays, before, strict=True):
        assert np.array_equal(array[1], row)
        assert not array[3:].any()


@pytest.mark.parametrize(
    ("batch", "capacity"),
    [
        (pieces((0, 0, 31)), 320),  # more than four rows copied a token
        (pieces((0, 100, 20), (1, 0, 1)), 320),  # few tokens behind many
        (pieces((0, 0, 40)), 128),  # nothing smaller
        (pieces((0, 0, 200)), 320),  # hardly smaller
    ],
)
def test_not_where_it_would_not_pay(stage, batch, capacity):
    stage.allocate(SLOTS, capacity, ())
    assert stage._excerpts.of(batch) is None


def test_memory_goes_with_the_cache(stage):
    stage.step(pieces((0, 0, 64)))
    assert stage._excerpts._memory
    stage.allocate(1, 64, ())
    assert not stage._excerpts._memory
