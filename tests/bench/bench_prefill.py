"""Time to the first token by the size of a prefill chunk: one prompt, several waiting ones, and one beside a stream.

The engine in this process; sizes take turns. With a drafter its context is filled, too. Prompts are random tokens, and
nothing is reused of earlier ones.

Run: PYTHONPATH=tests/support python tests/bench/bench_prefill.py --verifier DIR [--drafter DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from engines import Driver, KeepingSink, ids
from rich.console import Console
from rich.table import Table
from speculation import SpeculatingDriver

from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

STREAM_TOKENS = 400


@dataclass(eq=False)
class ClockedSink(KeepingSink):
    """Knows when each piece came."""

    def __post_init__(self) -> None:
        self.times: list[float] = []

    def delta(self, delta, last):  # type: ignore[no-untyped-def]
        self.times.append(time.perf_counter())
        super().delta(delta, last)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


class Subject:
    """An engine with one setting of the chunk sizes."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._random = np.random.default_rng(os.getpid())

    def _prompt(self, length: int) -> list[int]:
        return self._random.integers(0, self.driver.stage.artifact.vocab_size, length).tolist()

    def begin(self) -> None:
        """Its turn: another engine used the stage before."""
        self.driver.engine.cache.reset()

    def waiting(self, count: int, length: int) -> tuple[float, float]:
        """Seconds to the first token, of prompts that come at once: the mean, and the last one's."""
        sinks = [ClockedSink() for _ in range(count)]
        begin = time.perf_counter()
        for sink in sinks:
            self.driver.submit(ids(*self._prompt(length), max_tokens=1, ignore_eos=True), sink)
        self._drain()
        first = [sink.times[0] - begin for sink in sinks]
        return statistics.mean(first), max(first)

    def beside_streams(self, streams: int, length: int) -> tuple[float, float]:
        """Seconds to the first token beside running streams, and the longest pause of one of these meanwhile."""
        others = [ClockedSink() for _ in range(streams)]
        states = [
            self.driver.submit(ids(*self._prompt(100), max_tokens=STREAM_TOKENS, ignore_eos=True), sink)[0]
            for sink in others
        ]
        while not all(len(sink.times) > 4 for sink in others):
            self.driver.engine.step()
        sink, begin = ClockedSink(), time.perf_counter()
        state, _ = self.driver.submit(ids(*self._prompt(length), max_tokens=8, ignore_eos=True), sink)
        while not sink.times:
            self.driver.engine.step()
        self.driver.engine.step()
        pauses = [
            later - earlier
            for other in others
            for earlier, later in zip(other.times[3:], other.times[4:], strict=False)
            if later > begin
        ]
        for each in [*states, state]:
            each.cancelled = True
        self._drain()
        return sink.times[0] - begin, max(pauses)

    def _drain(self) -> None:
        while not self.driver.engine.idle:
            self.driver.engine.step()


def subjects(given: argparse.Namespace, stage: OnnxRuntimeVerifier, name: str, sizes: str) -> dict[int, Subject]:
    """One for each size, all on one verifier."""
    settings = {"threads": given.threads, "kv_budget_mib": 1024, "max_context": 1024, "prefix_reuse": False}
    made = {}
    for size in [int(size) for size in sizes.split(",") if size]:
        options = {**settings, "stage": stage, name: size}
        driver = Driver(given.verifier, **options)
        if given.drafter:
            driver = SpeculatingDriver(given.verifier, given.drafter, policy="causal", **options)
        made[size] = Subject(driver)
    return made


def report(title: str, columns: list[str], rows: dict[int, list[list[float]]]) -> None:
    """Medians of each row's samples."""
    table = Table("chunk", *columns, title=title)
    for size, samples in rows.items():
        table.add_row(str(size), *[milliseconds(statistics.median(column)) for column in zip(*samples, strict=True)])
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--verifier", type=Path, required=True)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--chunks", default="64,128,256,512,1024", help="prefill_chunk; none leaves the table out")
    parser.add_argument("--busy-chunks", default="24,48,96,192", help="prefill_chunk_busy; none leaves the table out")
    parser.add_argument("--length", type=int, default=500, help="of a prompt")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    stage = OnnxRuntimeVerifier(given.verifier, given.threads)
    one = f"1 prompt of {given.length}"
    idle: dict[int, list[list[float]]] = defaultdict(list)
    made = subjects(given, stage, "prefill_chunk", given.chunks)
    for turn in range(given.turns + 1):
        for size, subject in made.items():
            subject.begin()
            found = [subject.waiting(1, given.length)[0], *subject.waiting(4, 120), *subject.waiting(8, 40)]
            if turn:
                idle[size].append(found)
    if idle:
        title = "ms to the first token, nothing else runs (prefill_chunk)"
        report(title, [one, "4 of 120: mean", "last", "8 of 40: mean", "last"], idle)
    busy: dict[int, list[list[float]]] = defaultdict(list)
    made = subjects(given, stage, "prefill_chunk_busy", given.busy_chunks)
    for turn in range(given.turns + 1):
        for size, subject in made.items():
            subject.begin()
            found = [*subject.beside_streams(1, given.length), *subject.beside_streams(8, given.length)]
            if turn:
                busy[size].append(found)
    if busy:
        title = "ms to the first token beside streams (prefill_chunk_busy)"
        report(title, [f"1 stream: {one}", "longest pause", f"8 streams: {one}", "longest pause"], busy)
    print(f"medians of {given.turns} turns; load average {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
