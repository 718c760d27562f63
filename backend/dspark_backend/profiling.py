"""Measures the cost model on the real stages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.kv_cache import capacity_for
from dspark_backend.profile_grid import Grid, Level, ProfilePlan
from dspark_backend.stages.batch import RowMove, Segment, StepBatch
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch
from dspark_backend.stages.protocol import DrafterStage, VerifierStage

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done."""

_SWEEPS_WANTED = 4
"""The warm-up and some repetitions: a grid that cannot have so many in the time is too fine."""
_CONTEXT_ROWS = 2
"""Newly committed positions a request in a drafting round, as at an accepted length of about 2."""


@dataclass(frozen=True)
class _Point:
    capacity: int
    num_requests: int
    tokens_each: int
    """0: a drafting round."""
    slots: int = 0
    """Of a drafting round."""
    widest: int = 0
    """Tokens of the first request where it has more than the others."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of every request."""
        return [max(self.widest, self.tokens_each)] + [self.tokens_each] * (self.num_requests - 1)


@dataclass
class _Samples:
    """Measured seconds of every point."""

    by_point: dict[_Point, list[float]] = field(default_factory=dict)

    def add(self, point: _Point, seconds: float) -> None:
        self.by_point.setdefault(point, []).append(seconds)

    def model(self) -> CostModel:
        verify: dict[tuple[int, int], dict[int, float]] = {}
        draft: dict[tuple[int, int], dict[int, float]] = {}
        uneven: list[StepCurve] = []
        for point, samples in self.by_point.items():
            seconds = _typical(samples)
            if point.widest:
                uneven.append(StepCurve(point.num_requests, point.capacity, (point.widest,), (seconds,)))
            elif point.tokens_each:
                verify.setdefault((point.num_requests, point.capacity), {})[point.tokens_each] = seconds
            else:
                draft.setdefault((point.num_requests, point.capacity), {})[point.slots] = seconds
        return CostModel(_curves(verify), _curves(draft), tuple(uneven))


def _curves(measured: dict[tuple[int, int], dict[int, float]]) -> tuple[StepCurve, ...]:
    """Of the times by q at each (R, C)."""
    return tuple(
        StepCurve(requests, capacity, tuple(sorted(times)), tuple(times[each] for each in sorted(times)))
        for (requests, capacity), times in measured.items()
    )


def _typical(samples: list[float]) -> float:
    """The lower quartile: what else runs on the machine only ever adds to a time, and few samples have no good median.

    A factor that all points share does not matter to a scheduler; a single point that is off looks like a cliff.
    """
    return sorted(samples)[(len(samples) - 1) // 4]


class _Bench:
    """The stages with caches of the size under test."""

    def __init__(self, verifier: VerifierStage, drafter: DrafterStage | None) -> None:
        self._verifier = verifier
        self._drafter = drafter
        self._random = np.random.default_rng(0)

    def allocate(self, num_slots: int, capacity: int) -> None:
        for stage in (self._verifier, self._drafter):
            if stage is None:
                continue
            if not stage.lazy_memory:
                # A slot more than are served is more than an engine may have been built for.
                stage.allocate(num_slots, capacity, ())
                continue
            stage.allocate(num_slots + 1, capacity, ())
            # Memory that was never written is one page of zeros to the processor's caches: reading it costs nothing,
            # and attention would look free. A copy onto itself is not carried out, hence the slot more.
            for slot in range(num_slots):
                stage.copy_rows(RowMove(num_slots, slot, capacity))

    def release(self) -> None:
        for stage in (self._verifier, self._drafter):
            if stage is not None:
                stage.allocate(1, capacity_for(1), ())

    def seconds(self, point: _Point) -> float:
        """Run a step close to the end of the cache, every slot of it in use."""
        end = min(point.capacity, self._verifier.artifact.max_context)
        return self._verify_seconds(point, end) if point.tokens_each else self._draft_seconds(point, end)

    def _verify_seconds(self, point: _Point, end: int) -> float:
        vocab = self._verifier.artifact.vocab_size
        tokens = [self._random.integers(vocab, size=length).tolist() for length in point.lengths]
        batch = StepBatch.pack([Segment(slot, end - len(row), row, 0) for slot, row in enumerate(tokens)])
        begin = time.perf_counter()
        self._verifier.step(batch)
        return time.perf_counter() - begin

    def _draft_seconds(self, point: _Point, end: int) -> float:
        assert self._drafter is not None
        artifact, count = self._drafter.artifact, point.num_requests
        start = max(end - artifact.block_size, 0)
        rows = min(_CONTEXT_ROWS, start)
        slots = np.arange(count, dtype=np.int64)
        ones = np.ones(count, dtype=np.float32)
        batch = DraftBatch(
            context=ContextRows(
                features=self._random.standard_normal((count * rows, artifact.feature_size), dtype=np.float32),
                positions=np.tile(np.arange(start - rows, start, dtype=np.int64), count),
                slots=np.repeat(slots, rows),
            ),
            anchors=self._random.integers(artifact.vocab_size, size=count),
            slots=slots,
            starts=np.full(count, start, dtype=np.int64),
            uniforms=self._random.random((count, point.slots), dtype=np.float32),
            temperature=ones,
            top_k=np.full(count, artifact.num_candidates, dtype=np.int64),
            top_p=ones,
            min_p=np.zeros(count, dtype=np.float32),
        )
        begin = time.perf_counter()
        self._drafter.draft(batch)
        return time.perf_counter() - begin


class _Profiler:
    """Sweeps over the grid until the time is up."""

    def __init__(self, bench: _Bench, plan: ProfilePlan, progress: Progress) -> None:
        self._bench = bench
        self._plan = plan
        self._progress = progress
        self._begin = time.perf_counter()
        self.samples = _Samples()
        self.sweeps = 0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def choose(self, grid: Grid) -> Grid:
        """The finest grid that the time allows."""
        level, most = grid.levels[0], grid.levels[0].requests[-1]
        *finer, coarsest = grid.coarser()
        self._progress("warm up", 0.0)
        self._bench.allocate(most, level.capacity)
        lightest = self._twice(_Point(level.capacity, 1, 1))
        if lightest * most * grid.tokens_each[-1] > self._plan.max_seconds:
            return coarsest
        heaviest = self._twice(_Point(level.capacity, most, grid.tokens_each[-1]))
        widest = grid.widths[-1] if grid.widths else 0
        draft = self._twice(_Point(level.capacity, most, 0, widest)) if widest else 0.0
        allowed = self._plan.max_seconds / _SWEEPS_WANTED
        return next((one for one in finer if one.estimate_seconds(lightest, heaviest, draft) <= allowed), coarsest)

    def _twice(self, point: _Point) -> float:
        self._bench.seconds(point)
        return self._bench.seconds(point)

    def run(self, grid: Grid) -> None:
        for sweep in range(self._plan.repetitions):
            for index, level in enumerate(grid.levels):
                if sweep > 0 and self.elapsed > self._plan.max_seconds:
                    return
                self._sweep_level(level, grid, first=sweep == 0)
                done = (sweep * len(grid.levels) + index + 1) / (self._plan.repetitions * len(grid.levels))
                self._progress("measure step times", min(1.0, max(done, self.elapsed / self._plan.max_seconds)))
            self.sweeps += 1

    def _sweep_level(self, level: Level, grid: Grid, first: bool) -> None:
        tokens_each = grid.tokens_each
        self._bench.allocate(level.requests[-1], level.capacity)
        for requests in level.requests:
            for place, each in enumerate(tokens_each):
                point = _Point(level.capacity, requests, each)
                # The first run of a shape plans its memory, the first over other slots binds them: neither is typical.
                self._take(point, [point] if first or place == 0 else [], first)
            # A drafter alone makes steps in which requests have different numbers of tokens.
            if grid.widths and requests > 1 and tokens_each[-1] > 1:
                point = _Point(level.capacity, requests, 1, widest=tokens_each[-1])
                self._take(point, [point] if first else [], first)
        # Apart from the steps: a runtime's threads go on spinning after a run, and slow the other stage's next one.
        # Every draft in service follows a step, so here as well; not every step follows a draft.
        for requests in level.requests:
            for slots in grid.widths:
                point, step = _Point(level.capacity, requests, 0, slots), _Point(level.capacity, requests, 1)
                self._take(point, [point, step], first)

    def _take(self, point: _Point, before: list[_Point], first: bool) -> None:
        """Measure a point after untimed runs of others. Once the time is up, only what has no measurement yet."""
        late = self.elapsed > self._plan.max_seconds
        if late and not first:
            return
        for other in [] if late else before:
            self._bench.seconds(other)
        self.samples.add(point, self._bench.seconds(point))


def measure(verifier: VerifierStage, drafter: DrafterStage | None, plan: ProfilePlan, progress: Progress) -> CostModel:
    """Time steps of every size of the plan's grid, sweep by sweep, so that drifting noise hits all points alike.

    Call before the engine uses the stages: their caches are lost, and left at one slot of the smallest capacity.
    """
    bench = _Bench(verifier, drafter)
    profiler = _Profiler(bench, plan, progress)
    try:
        whole = Grid.of(plan, verifier.artifact, drafter.artifact if drafter else None)
        grid = profiler.choose(whole)
        profiler.run(grid)
    finally:
        bench.release()
    if grid != whole:
        logger.info("the model is slow for %g s of profiling: measured on a coarse grid", plan.max_seconds)
    logger.info(
        "measured %d points of the cost model, %d whole sweeps, %.1f s",
        len(profiler.samples.by_point), profiler.sweeps, profiler.elapsed,
    )  # fmt: skip
    progress("measured", 1.0)
    return profiler.samples.model()
