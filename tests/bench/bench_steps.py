"""Step times of verifiers of several precisions, by requests and tokens of each: absolute, and as ratios to the first.

The artifacts take turns, shape by shape, so that a noisy minute is shared; what is printed is the median.

Run: python tests/bench/bench_steps.py --verifier float32=DIR --verifier int8=DIR
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

SHAPES = ((1, 1), (1, 2), (1, 4), (1, 6), (4, 1), (4, 4), (8, 1), (8, 4), (16, 1), (16, 4))
"""(R requests, q tokens of each)."""


@dataclass(frozen=True)
class Contender:
    """One artifact."""

    name: str
    stage: OnnxRuntimeVerifier

    @classmethod
    def open(cls, text: str, threads: int) -> Contender:
        name, _, folder = text.partition("=")
        return cls(name, OnnxRuntimeVerifier(Path(folder), threads))

    def prepare(self, requests: int, context: int, tokens: int) -> StepBatch:
        """A batch of ``requests`` x ``tokens`` at the end of ``context`` cached positions."""
        self.stage.allocate(requests, context + tokens, ())
        ids = np.random.default_rng(0).integers(0, self.stage.artifact.vocab_size, tokens).tolist()
        return StepBatch.pack([Segment(slot, context, ids, 0) for slot in range(requests)])


@dataclass(frozen=True)
class Measured:
    """Medians of one artifact at one shape, milliseconds."""

    wall: float
    processor: float
    """Of all threads."""


def measure(contenders: list[Contender], shape: tuple[int, int], context: int, repeats: int) -> list[Measured]:
    """One entry a contender."""
    batches = [each.prepare(shape[0], context, shape[1]) for each in contenders]
    wall: list[list[float]] = [[] for _ in contenders]
    processor: list[list[float]] = [[] for _ in contenders]
    for turn in range(repeats + 2):
        for index, (each, batch) in enumerate(zip(contenders, batches, strict=True)):
            # Its own weights back into the cache before the clock starts.
            each.stage.step(batch)
            began, used = time.perf_counter(), time.process_time()
            each.stage.step(batch)
            if turn >= 2:
                wall[index].append(1e3 * (time.perf_counter() - began))
                processor[index].append(1e3 * (time.process_time() - used))
    return [Measured(statistics.median(w), statistics.median(p)) for w, p in zip(wall, processor, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--verifier", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--context", type=int, default=256, help="cached positions of each request")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 is one a core")
    given = parser.parse_args()
    contenders = [Contender.open(text, given.threads) for text in given.verifier]
    table = Table(title=f"step, ms (processor time), context {given.context}")
    table.add_column("R x q")
    for each in contenders:
        table.add_column(each.name, justify="right")
    for each in contenders[1:]:
        table.add_column(f"{each.name} / {contenders[0].name}", justify="right")
    for shape in SHAPES:
        first, *others = rows = measure(contenders, shape, given.context, given.repeats)
        cells = [f"{row.wall:.1f} ({row.processor:.1f})" for row in rows]
        ratios = [f"{row.wall / first.wall:.2f} ({row.processor / first.processor:.2f})" for row in others]
        table.add_row(f"{shape[0]} x {shape[1]}", *cells, *ratios)
    Console(width=120).print(table)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end")


if __name__ == "__main__":
    main()
