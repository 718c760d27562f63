"""Policies in turns, answer by answer, in one engine: real time, on a machine whose speed wanders.

Two policies can be compared as closely as they were measured together. Here a wave of answers, one a stream, runs with
one policy, and the same prompts with the next policy seconds later, in an order that is drawn anew for every wave: what
slows the machine for a minute slows them all. Counted are the rounds in which every stream is past its prompt; server
and client are left out. Ratios are means over waves with their standard errors.

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
from speculation import SpeculatingDriver
from speed.prompts import BenchPrompt, choose

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.profile_grid import ProfilePlan
from dspark_backend.profiling import measure
from dspark_backend.request import GenerationRequest

UNKNOWN = CostModel((StepCurve(1, 128, (1,), (1.0,)),))
"""For the engine whose stages are measured."""


@dataclass
class Wave:
    """What one policy did with the prompts of one wave, in rounds that every stream shared."""

    rounds: int = 0
    tokens: float = 0.0
    verified: float = 0.0
    """Tokens that the target ran."""
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        if not self.seconds:
            raise SystemExit("no round had all streams past their prompts: ask for more --tokens")
        return self.tokens / self.seconds


class Subject:
    """An engine with so many streams."""

    def __init__(self, given: argparse.Namespace, streams: int) -> None:
        self._streams = streams
        self._tokens = given.tokens
        self._driver = self._open(given, self._cost(given))

    def _open(self, given: argparse.Namespace, cost: CostModel) -> SpeculatingDriver:
        return SpeculatingDriver(
            given.verifier,
            given.drafter,
            cost,
            calibrated=True,
            max_slots=self._streams,
            threads=given.threads,
            kv_budget_mib=4096,
            prefix_reuse=False,
        )

    def _cost(self, given: argparse.Namespace) -> CostModel:
        driver = self._open(given, UNKNOWN)
        plan = ProfilePlan(max_slots=self._streams, max_seconds=given.profile_seconds)
        return measure(driver.stage, driver.drafter, plan, lambda _what, _done: None)

    def wave(self, prompts: Sequence[BenchPrompt], policy: str) -> Wave:
        """One answer a stream."""
        engine, found = self._driver.engine, Wave()
        for prompt in prompts:
            self._driver.submit(
                GenerationRequest(
                    messages=prompt.messages, max_tokens=self._tokens, ignore_eos=True, draft_policy=policy
                )
            )
        metrics = engine.metrics
        while not engine.idle:
            before = len(engine.roster.verifying)
            tokens, verified = metrics.generation_tokens_total.value, metrics.step_tokens_total.value
            begin = time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - begin
            if before == len(engine.roster.verifying) == self._streams:
                found.rounds += 1
                found.tokens += metrics.generation_tokens_total.value - tokens
                found.verified += metrics.step_tokens_total.value - verified
                found.seconds += seconds
        return found


def run(given: argparse.Namespace, streams: int, prompts: Sequence[BenchPrompt]) -> dict[str, list[Wave]]:
    """Waves of every policy; those of one place had the same prompts."""
    subject = Subject(given, streams)
    random = np.random.default_rng(given.seed)
    found: dict[str, list[Wave]] = defaultdict(list)
    for number in track(range(given.warm + given.waves), f"{streams} streams", transient=True):
        mine = [prompts[(number * streams + place) % len(prompts)] for place in range(streams)]
        for policy in random.permutation(given.policies).tolist():
            wave = subject.wave(mine, policy)
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
    parser.add_argument("--waves", type=int, default=12, help="answers of every stream and policy")
    parser.add_argument("--warm", type=int, default=1, help="waves before, not counted")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--profile-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bases = [policy for policy in given.bases if policy in given.policies]
    prompts = choose(given.prompts, 20, given.seed)
    table = Table(title="rounds that all streams share: tokens/s in all, and over other policies")
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
