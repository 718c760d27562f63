"""Session options of ONNX Runtime, compared: a drafting round followed by a verification step, as the engine runs them.

Two sessions have two pools of threads, and threads spin for a while after a run. Every case has a process of its own
(a shared pool is a setting of the whole process), and they take turns, so that whatever else the machine does hits all
of them alike. "alone" is a step after a step.

Run: python tests/bench/bench_threads.py --verifier DIR --drafter DIR
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from dspark_backend.stages import binding
from dspark_backend.stages.batch import RowMove, Segment, StepBatch
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

CAPACITY = 256
CONTEXT_ROWS = 2
SETTLE_SECONDS = 0.02
"""Between two cases: the other pools' threads have stopped spinning then."""


@dataclass(frozen=True)
class Case:
    """Options that differ from those that ``session_options`` sets."""

    entries: dict[str, str] = field(default_factory=dict)
    change: Callable[[ort.SessionOptions], None] = lambda options: None
    draft_threads: int | None = None
    draft_entries: dict[str, str] = field(default_factory=dict)
    """For the drafter's sessions alone."""


def _no_pattern(options: ort.SessionOptions) -> None:
    options.enable_mem_pattern = False


def _no_arena(options: ort.SessionOptions) -> None:
    options.enable_cpu_mem_arena = False


def _shared_pool(options: ort.SessionOptions) -> None:
    if options.use_per_session_threads and not _POOL:
        ort.set_global_thread_pool_sizes(options.intra_op_num_threads, 1)
        _POOL.append(True)
    options.use_per_session_threads = False


_POOL: list[bool] = []
"""Not empty once this process has a shared pool: it is made before the first session."""
SPIN, STOP = "session.intra_op.allow_spinning", "session.force_spinning_stop"
CASES = {
    "as it is": Case(),
    "as it is again": Case(),
    "spin-on": Case({STOP: "0"}),
    "spin-off": Case({STOP: "0", SPIN: "0"}),
    "draft-spin-off": Case({STOP: "0"}, draft_entries={SPIN: "0"}),
    "shared-pool": Case({STOP: "0"}, change=_shared_pool),
    "backoff": Case({"session.intra_op.spin_backoff_max": "8"}),
    "draft-1-thread": Case(draft_threads=1),
    "block-base-4": Case({"session.dynamic_block_base": "4"}),
    "affinity": Case({"session.intra_op_thread_affinities": "2"}),
    "no-pattern": Case(change=_no_pattern),
    "no-arena": Case(change=_no_arena),
}


@dataclass
class Times:
    """Milliseconds of single runs."""

    draft: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)

    def add(self, other: Times) -> None:
        for name in ("draft", "after", "alone", "both"):
            getattr(self, name).extend(getattr(other, name))

    def medians(self) -> list[float]:
        return [statistics.median(times) for times in (self.draft, self.after, self.alone, self.both)]


class Pair:
    """Both stages under one case."""

    def __init__(self, verifier: Path, drafter: Path, case: Case, threads: int) -> None:
        plain = binding.session_options

        def options(count: int, extra: dict[str, str]) -> ort.SessionOptions:
            made = plain(count)
            for key, value in (case.entries | extra).items():
                made.add_session_config_entry(key, value)
            case.change(made)
            return made

        with mock.patch.object(binding, "session_options", lambda count: options(count, {})):
            self.verifier = OnnxRuntimeVerifier(verifier, threads)
        draft_threads = threads if case.draft_threads is None else case.draft_threads
        with mock.patch.object(binding, "session_options", lambda count: options(count, case.draft_entries)):
            self.drafter = OnnxRuntimeDrafter(drafter, verifier, draft_threads)

    def allocate(self, streams: int) -> None:
        for stage in (self.verifier, self.drafter):
            stage.allocate(streams + 1, CAPACITY, ())
            for slot in range(streams):
                stage.copy_rows(RowMove(streams, slot, CAPACITY))

    def turn(self, steps: int, step: StepBatch, draft: DraftBatch) -> Times:
        """Rounds, then steps alone; the first of each is not counted."""
        times = Times()
        for index in range(steps + 1):
            begin = time.perf_counter()
            self.drafter.draft(draft)
            between = time.perf_counter()
            self.verifier.step(step)
            end = time.perf_counter()
            if index:
                times.draft.append(1e3 * (between - begin))
                times.after.append(1e3 * (end - between))
                times.both.append(1e3 * (end - begin))
        for index in range(steps + 1):
            begin = time.perf_counter()
            self.verifier.step(step)
            if index:
                times.alone.append(1e3 * (time.perf_counter() - begin))
        return times


def work(pipe: Connection, verifier: Path, drafter: Path, name: str, threads: int) -> None:
    """A case's process: (streams, tokens each, steps) in, times out; None ends it."""
    pair, shape = Pair(verifier, drafter, CASES[name], threads), (0, 0)
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        if task[:2] != shape:
            shape = task[:2]
            pair.allocate(shape[0])
            step, draft = batches(pair, *shape)
            pair.turn(2, step, draft)
        pipe.send(pair.turn(task[2], step, draft))


def batches(pair: Pair, streams: int, each: int) -> tuple[StepBatch, DraftBatch]:
    """A step of so many requests with so many tokens each, and the drafting round before it."""
    random, artifact = np.random.default_rng(0), pair.drafter.artifact
    start = CAPACITY - max(each, artifact.block_size)
    tokens = random.integers(0, artifact.vocab_size, (streams, each)).tolist()
    slots = np.arange(streams)
    rows = streams * CONTEXT_ROWS
    width = len(artifact.target_layer_ids) * artifact.hidden_size
    ones = np.ones(streams, dtype=np.float32)
    return StepBatch.pack([Segment(slot, start, row, 0) for slot, row in enumerate(tokens)]), DraftBatch(
        context=ContextRows(
            random.standard_normal((rows, width), dtype=np.float32),
            np.tile(np.arange(start - CONTEXT_ROWS, start), streams),
            slots.repeat(CONTEXT_ROWS),
        ),
        anchors=slots + 1,
        slots=slots,
        starts=np.full(streams, start),
        uniforms=random.random((streams, artifact.block_size), dtype=np.float32),
        temperature=ones,
        top_k=np.ones(streams, dtype=np.int64),
        top_p=ones,
        min_p=0 * ones,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--verifier", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="each takes the memory of both models")
    parser.add_argument("--shapes", default="1x1,1x4,8x3", help="requests x tokens of a step")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in given.cases.split(","):
        pipes[name], theirs = context.Pipe()
        context.Process(
            target=work, args=(theirs, given.verifier, given.drafter, name, given.threads), daemon=True
        ).start()
        pipes[name].recv()
    for shape in given.shapes.split(","):
        streams, each = map(int, shape.split("x"))
        times = {name: Times() for name in pipes}
        for _ in range(given.turns):
            for name, pipe in pipes.items():
                time.sleep(SETTLE_SECONDS)
                pipe.send((streams, each, given.steps))
                times[name].add(pipe.recv())
        table = Table("case", "draft", "step after it", "step alone", "draft + step", "to the first", title=shape)
        first = next(iter(times.values())).medians()[-1]
        for name, seen in times.items():
            table.add_row(name, *[f"{value:.2f}" for value in seen.medians()], f"{seen.medians()[-1] / first:.3f}")
        Console(width=110).print(table)
    for pipe in pipes.values():
        pipe.send(None)
    print(f"ms, medians of {given.turns} x {given.steps}; load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
