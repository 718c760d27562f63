"""Where the time of a round goes: the engine in this process, every part of a step timed by itself.

All streams decode together and draft every round: the cost model says that verifying costs next to nothing, so that the
scheduler does its whole work and never skips the drafter. Rounds in which a request starts or ends are left out.
Milliseconds are medians over the rounds; host is everything but the runs of the two models.

Run: PYTHONPATH=tests/support python tests/bench/bench_round.py --verifier DIR --drafter DIR
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import Driver, KeepingSink, request
from rich.console import Console
from rich.table import Table
from speculation import SpeculatingDriver

from dspark_backend.cost import CostModel, StepCurve

TEXT = (
    "The sea was calm when the small boat left the harbour, and nobody on board thought that the weather could turn "
    "before the evening. The captain had seen many such mornings. He looked at the sky, counted the clouds, wrote a "
    "line into his book and told the story of a storm that had once carried him far to the north, where "
)
FREE = CostModel((StepCurve(1, 128, (1, 2), (1.0, 1.0)),))
"""Neither drafting nor a token more in a step takes any time."""
DRAFT_RUN, VERIFY_RUN = "draft: stage run", "verify: stage run"
PARTS = (
    "admit, publish",
    "draft: packing, binding",
    DRAFT_RUN,
    "schedule",
    "verify: packing, binding",
    VERIFY_RUN,
    "acceptance",
    "bookkeeping",
    "text, emission",
)
REST = "bookkeeping"
"""What no part claims is counted here."""


@dataclass
class PartClock:
    """Exclusive times: while a part runs inside another one, only the inner one's clock goes on."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _stack: list[str] = field(default_factory=lambda: [REST])
    _since: float = 0.0

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time a method of an object, or of all objects of a class."""
        assert part in PARTS
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            self._turn()
            self._stack.append(part)
            try:
                return inner(*args, **options)
            finally:
                self._turn()
                self._stack.pop()

        setattr(owner, name, timed)

    def round(self, step: Callable[[], None]) -> dict[str, float]:
        """Run one step and return the seconds of its parts."""
        self.seconds = defaultdict(float)
        self._since = time.perf_counter()
        step()
        self._turn()
        return dict(self.seconds)


def attach(clock: PartClock, driver: Driver) -> None:
    """Put the clock on the parts of a driver's engine."""
    engine, stage = driver.engine, driver.stage
    for name in ("drop_ended", "admit", "publish"):
        clock.wrap(engine.roster, name, "admit, publish")
    clock.wrap(engine, "_prefill", "admit, publish")
    clock.wrap(engine, "_run", "verify: packing, binding")
    clock.wrap(stage._binding, "run", VERIFY_RUN)
    clock.wrap(engine, "_take", "acceptance")
    clock.wrap(engine.roster, "emit", "text, emission")
    if isinstance(driver, SpeculatingDriver):
        speculator: Any = engine._speculator
        clock.wrap(speculator, "plan", "schedule")
        clock.wrap(speculator, "_draft", "draft: packing, binding")
        clock.wrap(driver.drafter._draft, "run", DRAFT_RUN)


def rounds(driver: Driver, streams: int, tokens: int, sampling: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Seconds by part of the rounds in which every stream takes part from start to end."""
    clock = PartClock()
    attach(clock, driver)
    sinks = [KeepingSink() for _ in range(streams)]
    for index, sink in enumerate(sinks):
        wanted = request(text=f"Chapter {index}. {TEXT}", max_tokens=tokens, ignore_eos=True, **sampling)
        driver.submit(wanted, sink)
    for sequence in driver.engine.roster.waiting:
        clock.wrap(sequence, "append", "text, emission")
    while not driver.engine.idle:
        steady = len(driver.engine.roster.verifying) == streams
        seconds = clock.round(driver.engine.step)
        if steady and len(driver.engine.roster.verifying) == streams:
            yield seconds
    for sink in sinks:
        assert len(sink.tokens()) == tokens


@dataclass(frozen=True)
class Breakdown:
    """Median milliseconds of a round and of its parts."""

    streams: int
    count: int
    whole: float
    parts: dict[str, float]
    host_percent: float
    """Median over the rounds of what is neither model, in percent of the round."""

    @classmethod
    def of(cls, streams: int, measured: list[dict[str, float]]) -> Breakdown:
        def median(values: Iterator[float]) -> float:
            return statistics.median(values)

        def models(one: dict[str, float]) -> float:
            return one.get(DRAFT_RUN, 0.0) + one.get(VERIFY_RUN, 0.0)

        return cls(
            streams,
            len(measured),
            1e3 * median(sum(one.values()) for one in measured),
            {part: 1e3 * median(one.get(part, 0.0) for one in measured) for part in PARTS},
            100 * median(1.0 - models(one) / sum(one.values()) for one in measured),
        )


def report(title: str, breakdowns: list[Breakdown]) -> None:
    table = Table(title=title)
    table.add_column("ms (percent of the round)")
    for one in breakdowns:
        table.add_column(f"{one.streams} streams", justify="right")
    for part in PARTS:
        table.add_row(
            part, *[f"{one.parts[part]:.3f} ({100 * one.parts[part] / one.whole:4.1f})" for one in breakdowns]
        )
    table.add_section()
    table.add_row("round", *[f"{one.whole:.3f}" for one in breakdowns])
    table.add_row("rounds measured", *[str(one.count) for one in breakdowns])
    table.add_row("host, percent (aim: below 5)", *[f"{one.host_percent:.1f}" for one in breakdowns])
    table.add_row(
        "draft run / verify run (aim at 1: below 0.2)",
        *[f"{one.parts[DRAFT_RUN] / one.parts[VERIFY_RUN]:.2f}" for one in breakdowns],
    )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--verifier", type=Path, required=True, help="an exported verifier with a tokenizer")
    parser.add_argument("--drafter", type=Path, help="an exported drafter; none measures plain decoding")
    parser.add_argument("--policy", default="causal")
    parser.add_argument("--streams", default="1,4,8,16")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--log-probs", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 is one a core")
    given = parser.parse_args()
    sampling = {"temperature": given.temperature, "top_p": given.top_p, "log_probs": given.log_probs}
    settings = {"threads": given.threads, "kv_budget_mib": 1024, "max_context": 512}
    driver: Driver
    breakdowns = []
    for streams in map(int, given.streams.split(",")):
        if given.drafter:
            driver = SpeculatingDriver(given.verifier, given.drafter, FREE, given.policy, **settings)
        else:
            driver = Driver(given.verifier, **settings)
        breakdowns.append(Breakdown.of(streams, list(rounds(driver, streams, given.tokens, sampling))))
    kind = "greedy" if given.temperature == 0.0 else f"temperature {given.temperature:g}, top_p {given.top_p:g}"
    drafted = given.policy if given.drafter else "no drafter"
    report(f"{given.verifier.name}: {kind}, {drafted}", breakdowns)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end")


if __name__ == "__main__":
    main()
