"""Measuring the cost model on real stages (the golden models). No test looks at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import artifacts
import numpy as np
import pytest
from stage_doubles import WrappedStage

from dspark_backend.cost import StepCurve
from dspark_backend.profile_grid import Grid, Level, ProfilePlan
from dspark_backend.profiling import measure
from dspark_backend.stages.batch import RowMove, Segment, StepBatch
from dspark_backend.stages.draft_batch import DraftBatch, DraftOutput
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.drafter import DrafterExport, export_drafter

NAME = "qwen3_vanilla"
PLAN = ProfilePlan(max_slots=3, repetitions=2)


class WatchedStage(WrappedStage):
    """A real stage that notes its allocations, copies and drafts."""

    def __init__(self, inner: Any, **hooks: Any) -> None:
        super().__init__(inner, **hooks)
        self.allocations: list[tuple[int, int]] = []
        self.copies: list[tuple[tuple[int, int], RowMove]] = []
        self.drafts: list[tuple[tuple[int, int], DraftBatch]] = []

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self.allocations.append((num_slots, capacity))
        super().allocate(num_slots, capacity, moves)

    def copy_rows(self, move: RowMove) -> None:
        self.copies.append((self.allocations[-1], move))
        super().copy_rows(move)

    def draft(self, batch: DraftBatch) -> DraftOutput:
        self.drafts.append((self.allocations[-1], batch))
        output: DraftOutput = self.inner.draft(batch)
        return output


@dataclass(frozen=True)
class Pair:
    verifier: Path
    drafter: Path


@pytest.fixture(scope="module")
def pair(golden_artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    verifier, out = golden_artifacts[NAME], tmp_path_factory.mktemp("drafter")
    export_drafter(DrafterExport(artifacts.GOLDEN / NAME / "drafter", verifier, out), artifacts.silent)
    return Pair(verifier, out)


@pytest.fixture
def verifier(pair: Pair) -> Iterator[WatchedStage]:
    stage = WatchedStage(OnnxRuntimeVerifier(pair.verifier, threads=1))
    yield stage
    stage.close()


@pytest.fixture
def drafter(pair: Pair) -> Iterator[WatchedStage]:
    stage = WatchedStage(OnnxRuntimeDrafter(pair.drafter, pair.verifier, threads=1))
    yield stage
    stage.close()


def places(curves: Sequence[StepCurve]) -> set[tuple[int, int]]:
    return {(curve.num_requests, curve.capacity) for curve in curves}


def test_every_point_of_the_grid_is_measured(verifier: WatchedStage, drafter: WatchedStage) -> None:
    seen: list[float] = []
    model = measure(verifier, drafter, PLAN, lambda stage, done: seen.append(done))
    block = drafter.artifact.block_size
    # The golden models have a context of 512: no third capacity.
    assert places(model.verify) == places(model.draft) == {(r, c) for r in (1, 2, 3) for c in (128, 512)}
    assert {curve.tokens_each for curve in model.verify} == {tuple(sorted({1, 2, 3, 5, block + 1}))}
    assert {curve.tokens_each for curve in model.draft} == {(1, block)}
    assert places(model.uneven) == {(r, c) for r in (2, 3) for c in (128, 512)}
    assert {curve.tokens_each for curve in model.uneven} == {(block + 1,)}
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert all(0.0 <= done <= 1.0 for done in seen)


def test_without_a_drafter_few_depths_are_measured(verifier: WatchedStage) -> None:
    model = measure(verifier, None, PLAN, artifacts.silent)
    assert {curve.tokens_each for curve in model.verify} == {(1, 2, 4)}
    assert model.draft == model.uneven == ()
    assert model.draft_seconds(2, 128, 1) == 0.0


def test_steps_are_what_serving_runs(verifier: WatchedStage, drafter: WatchedStage) -> None:
    measure(verifier, drafter, PLAN, artifacts.silent)
    block, ends, uneven = drafter.artifact.block_size, set(), False
    for batch in verifier.batches:
        lengths = np.diff(batch.offsets)
        # Even, or one request as wide as can be and the others with their anchors alone.
        assert (lengths == lengths[0]).all() or (lengths[0] == block + 1 and (lengths[1:] == 1).all())
        uneven |= len(set(lengths.tolist())) > 1
        assert batch.slots.tolist() == list(range(len(lengths)))
        assert batch.logit_rows.tolist() == list(range(batch.num_tokens)), "verification wants the logits of all"
        ends.add(int(batch.positions.max()))
        assert (batch.positions[batch.offsets[1:] - 1] == batch.positions.max()).all()
    assert ends == {127, 511}, "the last rows of a full context"
    assert uneven
    for (_, capacity), draft in drafter.drafts:
        assert (draft.starts == capacity - block).all()
        assert draft.context.positions.max() == draft.starts[0] - 1
        assert draft.context.num_rows == 2 * len(draft.slots)


@pytest.mark.parametrize("which", ["verifier", "drafter"])
def test_every_row_is_written_before_it_is_read(
    which: str, verifier: WatchedStage, drafter: WatchedStage
) -> None:  # fmt: skip
    measure(verifier, drafter, PLAN, artifacts.silent)
    stage = verifier if which == "verifier" else drafter
    for slots, capacity in set(stage.allocations[:-1]):
        moves = {move for size, move in stage.copies if size == (slots, capacity)}
        assert moves == {RowMove(slots - 1, slot, capacity) for slot in range(slots - 1)}


def test_points_are_interleaved(verifier: WatchedStage) -> None:
    measure(verifier, None, replace(PLAN, repetitions=3, capacities=(128,)), artifacts.silent)
    shapes = [(len(batch.slots), batch.num_tokens) for batch in verifier.batches]
    places_of_one = [index for index, shape in enumerate(shapes) if shape == (3, 12)]
    between = [shapes[a + 1 : b] for a, b in zip(places_of_one[-3:], places_of_one[-2:], strict=False)]
    grid = {(r, r * q) for r in (1, 2, 3) for q in (1, 2, 4)} - {(3, 12)}
    assert len(between) == 2
    assert all(set(others) == grid for others in between)


def test_stages_are_left_small_and_usable(verifier: WatchedStage, drafter: WatchedStage) -> None:
    measure(verifier, drafter, PLAN, artifacts.silent)
    assert verifier.allocations[-1] == drafter.allocations[-1] == (1, 128)
    output = verifier.step(StepBatch.pack([Segment(0, 0, [1, 2, 3], 2)]))
    assert np.isfinite(output.logits).all()


def test_a_stage_that_fails_is_left_small_and_the_error_comes_through(pair: Pair) -> None:
    def fail(batch: StepBatch) -> None:
        if batch.num_tokens == 4:
            raise RuntimeError("broken on purpose")

    stage = WatchedStage(OnnxRuntimeVerifier(pair.verifier, threads=1), before=fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        measure(stage, None, PLAN, artifacts.silent)
    assert stage.allocations[-1] == (1, 128)
    stage.close()


def test_a_slow_model_is_measured_coarsely(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    stage = WatchedStage(OnnxRuntimeVerifier(pair.verifier, threads=1), before=lambda batch: time.sleep(0.2))
    with caplog.at_level(logging.INFO):
        model = measure(stage, None, ProfilePlan(max_slots=8, max_seconds=1.0), artifacts.silent)
    assert places(model.verify) == {(1, 128), (8, 128)}
    assert {curve.tokens_each for curve in model.verify} == {(1, 4)}
    assert "coarse grid" in caplog.text
    # Two to look, then each of the four points at least once; nothing is repeated after the time is up.
    assert 6 <= len(stage.batches) < 2 + 4 * 9
    stage.close()


def test_a_grid_keeps_to_memory_and_context(verifier: WatchedStage, drafter: WatchedStage) -> None:
    target, draft = verifier.artifact, drafter.artifact
    row = target.cache_bytes_per_token + draft.cache_bytes_per_token
    plan = ProfilePlan(max_slots=6, memory_bytes=row * 512 * 4)
    grid = Grid.of(plan, target, draft)
    assert grid.levels == (Level(128, (1, 2, 4, 6)), Level(512, (1, 2, 3)))
    assert Grid.of(replace(plan, memory_bytes=1), target, draft).levels == (Level(128, (1,)),)
    short = replace(target, max_context=4)
    assert Grid.of(plan, short, None) == Grid((Level(128, (1, 2, 4, 6)),), (1, 2, 4))
    assert Grid.of(plan, replace(target, max_context=3), None).tokens_each == (1, 2)


def test_coarser_grids_shrink_and_keep_the_ends() -> None:
    levels = tuple(Level(capacity, (1, 2, 4, 8, 16, 32, 64)) for capacity in (128, 512, 2048))
    grids = list(Grid(levels, (1, 2, 3, 5, 8)).coarser())
    sizes = [grid.estimate_seconds(0.01, 0.1, 0.01) for grid in grids]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    for grid in grids:
        assert (grid.levels[0].requests[0], grid.levels[0].requests[-1]) == (1, 64)
        assert (grid.tokens_each[0], grid.tokens_each[-1]) == (1, 8)
    assert grids[0].levels == levels
    # A second capacity and numbers of requests between the ends outlast tokens between the ends.
    assert grids[-3] == Grid((Level(128, (1, 4, 64)), Level(2048, (1, 4, 64))), (1, 8))
    assert grids[-1] == Grid((Level(128, (1, 64)),), (1, 8))


@pytest.mark.parametrize(
    "wrong", [{"max_slots": 0}, {"capacities": ()}, {"capacities": (0,)}, {"max_seconds": 0.5}, {"repetitions": 0}]
)
def test_a_senseless_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ProfilePlan(**wrong)
