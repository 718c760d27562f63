"""Policies on the model's clock: real engine, real models, real prompts, but a step takes what the cost model says.

On a machine whose speed wanders, two policies can be compared only as far as the minutes they ran in can. Here the
minutes do not matter: tokens, acceptance and every choice of the scheduler are real, and time is that of measured step
times (a file in the cost cache, where ``dspark-export profile`` and the server keep them), which the scheduler knows
exactly. So this shows what its choices are worth, without the machine's noise and without errors of the model. Prompts,
host and transport take no time.

Run: PYTHONPATH=tests/support python tests/bench/bench_model_clock.py --verifier DIR --drafter DIR --cost FILE \
         --prompts DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speculation import SpeculatingDriver
from speed.in_engine import asked_in_turn, busy, open_driver
from speed.prompts import BenchPrompt, choose

import dspark_backend.engine
import dspark_backend.speculation
from dspark_backend.cost import CostModel
from dspark_backend.cost_cache import read_cost_file
from dspark_backend.request import GenerationRequest
from dspark_backend.stages.batch import StepBatch, StepOutput
from dspark_backend.stages.draft_batch import DraftBatch, DraftOutput

WAVES = 3
"""Requests a stream, of which the first half wave is not counted."""
LEAST = 12
"""Requests, at least."""
ADAPTIVE = ("causal", "lagged")


@dataclass
class ModelClock:
    """Stands for the module ``time`` where the engine measures its steps."""

    model: CostModel
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def attach(self, driver: SpeculatingDriver) -> None:
        """Let steps of answers and drafting rounds take what the model says; prompts take nothing."""
        engine, stage, drafter = driver.engine, driver.stage, driver.drafter
        prefill, step, draft = engine._prefill, stage.step, drafter.draft
        free = False

        def prompts() -> None:
            nonlocal free
            free = True
            prefill()
            free = False

        def verified(batch: StepBatch) -> StepOutput:
            if not free:
                counts, widest = np.array([batch.num_tokens]), batch.layout.longest
                capacity = engine.cache.capacity
                self.now += float(self.model.verify_seconds(len(batch.slots), counts, capacity, widest)[0])
            return step(batch)

        def drafted(batch: DraftBatch) -> DraftOutput:
            self.now += self.model.draft_seconds(len(batch.anchors), engine.cache.capacity, batch.uniforms.shape[1])
            return draft(batch)

        for owner, name, method in (
            (engine, "_prefill", prompts),
            (stage, "step", verified),
            (drafter, "draft", drafted),
        ):
            setattr(owner, name, method)

    @contextmanager
    def running(self) -> Iterator[None]:
        with (
            mock.patch.object(dspark_backend.engine, "time", self),
            mock.patch.object(dspark_backend.speculation, "time", self),
        ):
            yield


@dataclass(frozen=True)
class Counts:
    """Where the engine stands, or what it did between two of these."""

    tokens: float
    seconds: float
    steps: float
    step_tokens: float
    drafted: float

    @classmethod
    def of(cls, driver: SpeculatingDriver, clock: ModelClock) -> Counts:
        metrics = driver.engine.metrics
        totals = (metrics.steps_total, metrics.step_tokens_total, metrics.spec_decode_num_draft_tokens_total)
        return cls(metrics.generation_tokens_total.value, clock.now, *(total.value for total in totals))

    def since(self, begin: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(astuple(self), astuple(begin), strict=True)))

    @property
    def per_second(self) -> float:
        """Tokens a second of all streams."""
        return self.tokens / self.seconds


def measure(
    driver: SpeculatingDriver, clock: ModelClock, requests: Sequence[GenerationRequest], streams: int
) -> Counts:
    """Keep so many streams busy; counted from when half of them have ended an answer until no request is left."""
    begin = end = Counts.of(driver, clock)
    counting = False
    for answered in busy(driver, requests, streams):
        if not counting and answered >= -(-streams // 2):
            begin, counting = end, True
        driver.engine.step()
        end = Counts.of(driver, clock)
    return end.since(begin)


def run(given: argparse.Namespace, streams: int, model: CostModel, prompts: Sequence[BenchPrompt]) -> list[Counts]:
    """Every policy at one number of streams, on one engine, same prompts."""
    driver = open_driver(given, model, streams)
    clock = ModelClock(model)
    clock.attach(driver)
    count = max(WAVES * streams, LEAST)

    with clock.running():
        return [
            measure(driver, clock, asked_in_turn(prompts, count, given.tokens, policy), streams)
            for policy in track(given.policies, f"{streams} streams", transient=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--verifier", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--cost", type=Path, required=True, help="cost-*.json of the cost cache")
    parser.add_argument("--prompts", type=Path, required=True, help="folder with gsm8k, mbpp and mt-bench .jsonl")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--policies", nargs="+", default=["off", "fixed:1", "fixed:5", "threshold:0.5", *ADAPTIVE])
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, in the mean")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    _, model = read_cost_file(given.cost)
    prompts = choose(given.prompts, 64, seed=0)
    rates = Table(title="tokens/s of all streams on the model's clock; tokens a step; drafts a step")
    ratios = Table(title="over the best of the other policies")
    for table, columns in ((rates, given.policies), (ratios, ADAPTIVE)):
        for heading in ("streams", *columns):
            table.add_column(heading, justify="right")
    for streams in given.streams:
        found = dict(zip(given.policies, run(given, streams, model, prompts), strict=True))
        cells = [
            f"{one.per_second:.0f}  {one.step_tokens / one.steps:.1f}  {one.drafted / one.steps:.1f}"
            for one in found.values()
        ]
        rates.add_row(str(streams), *cells)
        best = max(one.per_second for policy, one in found.items() if policy not in ADAPTIVE)
        ratios.add_row(str(streams), *[f"{found[policy].per_second / best:.3f}" for policy in ADAPTIVE])
    for table in (rates, ratios):
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
