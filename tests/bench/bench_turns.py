"""Policies in turns, answer by answer, in one engine: real time, on a machine whose speed wanders.

Two policies can be compared as closely as they were measured together. Here a wave of answers, one a stream, runs with
one policy, and the same prompts with the next policy seconds later, in an order that is drawn anew for every wave: what
slows the machine for a minute slows them all. Counted are the rounds in which every stream is past its prompt; server
and client are left out. Ratios are means over waves with their standard errors.

With ``--answers 5`` a wave is a closed loop, prompts and all: every stream asks again as soon as it is answered.

Run: PYTHONPATH=tests/support python tests/bench/bench_turns.py --verifier DIR --drafter DIR --prompts DIR
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed.in_engine import asked, asked_in_turn, busy, open_driver
from speed.prompts import BenchPrompt, choose

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.profile_grid import ProfilePlan
from dspark_backend.profiling import measure

UNKNOWN = CostModel((StepCurve(1, 128, (1,), (1.0,)),))
"""For the engine whose stages are measured."""


@dataclass
class Wave:
    """What one policy did with the prompts of one wave while all streams were busy."""

    rounds: int = 0
    tokens: float = 0.0
    verified: float = 0.0
    """Tokens that the target ran."""
    seconds: float = 0.0

    def add(self, other: Wave) -> None:
        self.rounds += other.rounds
        self.tokens += other.tokens
        self.verified += other.verified
        self.seconds += other.seconds

    @property
    def per_second(self) -> float:
        if not self.seconds:
            raise SystemExit("no round had all streams past their prompts: ask for more --tokens, or more --answers")
        return self.tokens / self.seconds


class Subject:
    """An engine with so many streams."""

    def __init__(self, given: argparse.Namespace, streams: int) -> None:
        self._streams = streams
        self._tokens = given.tokens
        self._driver = open_driver(given, self._cost(given), streams)

    def _cost(self, given: argparse.Namespace) -> CostModel:
        driver = open_driver(given, UNKNOWN, self._streams)
        plan = ProfilePlan(max_slots=self._streams, max_seconds=given.profile_seconds)
        return measure(driver.stage, driver.drafter, plan, lambda _what, _done: None)

    def wave(self, prompts: Sequence[BenchPrompt], policy: str) -> Wave:
        """One answer a stream; counted are rounds in which all are past their prompts."""
        verifying, found = self._driver.engine.roster.verifying, Wave()
        for prompt in prompts:
            self._driver.submit(asked(prompt, self._tokens, policy))
        while not self._driver.engine.idle:
            before = len(verifying)
            step = self._step()
            if before == len(verifying) == self._streams:
                found.add(step)
        return found

    def loop(self, prompts: Sequence[BenchPrompt], policy: str) -> Wave:
        """Several answers a stream; counted is the time from the first answer until a stream finds no prompt left."""
        found = Wave()
        requests = asked_in_turn(prompts, len(prompts), self._tokens, policy)
        for answered in busy(self._driver, requests, self._streams):
            step = self._step()
            if answered:
                found.add(step)
        return found

    def _step(self) -> Wave:
        engine = self._driver.engine
        metrics = engine.metrics
        tokens, verified = metrics.generation_tokens_total.value, metrics.step_tokens_total.value
        begin = time.perf_counter()
        engine.step()
        return Wave(
            rounds=1,
            tokens=metrics.generation_tokens_total.value - tokens,
            verified=metrics.step_tokens_total.value - verified,
            seconds=time.perf_counter() - begin,
        )


def run(given: argparse.Namespace, streams: int, prompts: Sequence[BenchPrompt]) -> dict[str, list[Wave]]:
    """Waves of every policy; those of one place had the same prompts."""
    subject = Subject(given, streams)
    random = np.random.default_rng(given.seed)
    found: dict[str, list[Wave]] = defaultdict(list)
    for number in track(range(given.warm + given.waves), f"{streams} streams", transient=True):
        size = streams * given.answers
        mine = [prompts[(number * size + place) % len(prompts)] for place in range(size)]
        for policy in random.permutation(given.policies).tolist():
            wave = (subject.wave if given.answers == 1 else subject.loop)(mine, policy)
            if number >= given.warm:
                found[policy].append(wave)
    return found


def ratio(ours: Sequence[Wave], theirs: Sequence[Wave]) -> str:
    """Geometric mean over waves of the quotient of tokens a second, and its standard error."""
    logs = [math.log(mine.per_second / other.per_second) for mine, other in zip(ours, theirs, strict=True)]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    return f"{math.exp(statistics.fmean(logs)):.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--verifier", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="folder with gsm8k, mbpp and mt-bench .jsonl")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--policies", nargs="+", default=["off", "fixed:1", "fixed:5", "causal", "lagged"])
    parser.add_argument("--bases", nargs="+", default=["off", "fixed:1", "fixed:5"], help="to compare with")
    parser.add_argument("--waves", type=int, default=12, help="of every policy")
    parser.add_argument("--answers", type=int, default=1, help="of a stream in a wave: several are a closed loop")
    parser.add_argument("--warm", type=int, default=1, help="waves before, not counted")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer; in a loop, in the mean")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--profile-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bases = [policy for policy in given.bases if policy in given.policies]
    prompts = choose(given.prompts, 20, given.seed)
    shared = "rounds that all streams share" if given.answers == 1 else "closed loops, prompts included"
    table = Table(title=f"{shared}: tokens/s in all, and over other policies")
    for heading in ("streams", "policy", "ms", "tokens", "verified", "tokens/s", *(f"over {base}" for base in bases)):
        table.add_column(heading, justify="right")
    for streams in given.streams:
        found = run(given, streams, prompts)
        for policy in given.policies:
            waves = found[policy]
            rounds, seconds = sum(wave.rounds for wave in waves), sum(wave.seconds for wave in waves)
            tokens, verified = sum(wave.tokens for wave in waves), sum(wave.verified for wave in waves)
            table.add_row(
                str(streams),
                policy,
                f"{1e3 * seconds / rounds:.1f}",
                f"{tokens / rounds / streams:.2f}",
                f"{verified / rounds / streams:.2f}",
                f"{tokens / seconds:.0f}",
                *("" if policy == base else ratio(waves, found[base]) for base in bases),
            )
        table.add_section()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
