"""Random traffic through the whole engine: nothing fails, nothing is lost, and every text is what it is alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import artifacts
import numpy as np
import pytest
from engines import Driver, KeepingSink, ids, prompt
from speculation import CHEAP, DEAR, POLICIES, SpeculatingDriver

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.delta import FinishReason
from dspark_backend.request import GenerationRequest
from dspark_backend.sequence import RequestState
from dspark_backend.stages.batch import StepBatch, StepOutput
from dspark_export.drafter import DrafterExport, export_drafter

REQUESTS = 12
SHARED = [prompt(seed, 480) for seed in range(3)]
"""Long texts, beginnings of which are prompts: rows of one request are there for another."""
UNEVEN = CostModel(
    verify=(StepCurve(1, 128, (1, 2), (1.0, 1.2)), StepCurve(16, 128, (1, 2), (2.0, 3.0))),
    draft=(StepCurve(1, 128, (1, 4), (0.1, 0.2)), StepCurve(16, 128, (1, 4), (0.2, 0.4))),
    uneven=(StepCurve(16, 128, (5,), (3.5,)),),
)
"""Drafting pays for some and not for others, wide blocks not always."""
OWN_DEPTHS = ("off", "fixed:1", "fixed:3", "fixed:64", "threshold:0.2")
"""With these a seed decides the text."""


@dataclass(eq=False)
class Asked:
    wanted: GenerationRequest
    state: RequestState
    sink: KeepingSink
    cancelled: bool = False


Said = tuple[list[int], list[float], FinishReason | None]


def said(sink: KeepingSink, wanted: GenerationRequest) -> list[Said]:
    """Tokens, log-probabilities to the last bit, and how it ended, by sequence."""
    return [(sink.tokens(place), sink.log_probs(place), sink.reason(place)) for place in range(wanted.num_sequences)]


class Alone:
    """Every request on an engine that has nothing else to do and no drafter; answers are kept."""

    def __init__(self, verifier: Path, drafter: Path) -> None:
        self._plain = Driver(verifier, prefix_reuse=False)
        self._drafting = SpeculatingDriver(verifier, drafter, prefix_reuse=False)

    def answer(self, wanted: GenerationRequest) -> list[Said]:
        if wanted.sampling.greedy:
            (sink,) = self._plain.run(replace(wanted, draft_policy="off"))
        else:
            (sink,) = self._drafting.run(wanted)
        return said(sink, wanted)


@pytest.fixture(scope="module", params=["qwen3_gated", "gemma4_vanilla"])
def pair(request, tmp_path_factory, golden_artifacts) -> tuple[Path, Path, Alone]:
    verifier = golden_artifacts[request.param]
    drafter = tmp_path_factory.mktemp(request.param) / "drafter"
    export_drafter(DrafterExport(artifacts.GOLDEN / request.param / "drafter", verifier, drafter), artifacts.silent)
    return verifier, drafter, Alone(verifier, drafter)


def random_request(random: Random, driver: SpeculatingDriver) -> GenerationRequest:
    context = driver.engine.cache.max_context
    length = random.choice([random.randint(1, 40), random.randint(1, 470), 255, 256, 257, 384])
    tokens = random.choice(SHARED)[: min(length, context - 12)]
    if random.random() < 0.3:
        tokens = (*tokens, *prompt(random.randrange(10**6), random.randint(1, 8)))
    options: dict[str, Any] = {}
    policy = random.choice(POLICIES)
    if random.random() < 0.3:
        options = {"temperature": random.choice([0.5, 1.0]), "seed": random.randrange(100)}
        policy = random.choice(OWN_DEPTHS)
    if random.random() < 0.2:
        options["num_sequences"] = min(driver.config.max_slots, random.randint(2, 3))
    for chance, option, values in (
        (0.2, "max_draft_tokens", range(5)),
        (0.3, "log_probs", (True,)),
        (0.2, "repetition_penalty", (0.7, 1.3)),
        (0.2, "frequency_penalty", (-1.0, 0.5, 3.0)),
        (0.2, "presence_penalty", (1.0,)),
        (0.2, "ignore_eos", (True,)),
        (0.2, "min_tokens", (1, 3)),
        (0.2, "priority", (1, 2)),
    ):
        if random.random() < chance:
            options[option] = random.choice(values)
    longest = context - len(tokens)
    return ids(
        *tokens, max_tokens=min(longest, random.choice([3, 4, random.randint(3, 30)])), draft_policy=policy, **options
    )


def random_driver(random: Random, verifier: Path, drafter: Path) -> SpeculatingDriver:
    return SpeculatingDriver(
        verifier,
        drafter,
        cost=random.choice([CHEAP, DEAR, UNEVEN]),
        max_slots=random.choice([1, 2, 3, 5, 8]),
        prefill_chunk=random.choice([7, 64, 256, 512]),
        prefill_chunk_busy=random.choice([5, 64, 256]),
        prefix_reuse=random.random() < 0.7,
        kv_budget_mib=random.choice([1, 2, 64]),
    )


def serve(driver: SpeculatingDriver, random: Random) -> list[Asked]:
    """Requests that come at random; one in a hundred rounds loses a client."""
    asked: list[Asked] = []
    for _ in range(20000):
        if len(asked) < REQUESTS and random.random() < 0.25:
            wanted = random_request(random, driver)
            asked.append(Asked(wanted, *driver.submit(wanted)))
        live = [one for one in asked if not one.sink.ends]
        if live and random.random() < 0.01:
            one = random.choice(live)
            one.state.cancelled = one.cancelled = True
        driver.engine.step()
        driver.engine.cache.check_integrity()
        if len(asked) == REQUESTS and driver.engine.idle:
            break
    assert [one.sink.ends for one in asked] == [1] * REQUESTS and not driver.engine.cache.active
    return asked


@pytest.mark.parametrize("seed", range(16))
def test_random_traffic(pair, seed, caplog):
    verifier, drafter, alone = pair
    random = Random(seed)
    with caplog.at_level(logging.WARNING):
        asked = serve(random_driver(random, verifier, drafter), random)
    assert [record.getMessage() for record in caplog.records] == []
    for one in asked:
        if not one.cancelled:
            assert said(one.sink, one.wanted) == alone.answer(one.wanted), one.wanted


def make_unreliable(driver: SpeculatingDriver, random: Random) -> None:
    """One call in fifty of a stage fails, or says what is no number."""

    def failing(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*given: Any) -> Any:
            if random.random() < 0.02:
                raise RuntimeError("out of order")
            return real(*given)

        setattr(owner, name, call)

    failing(driver.stage, "step")
    failing(driver.drafter, "draft")
    failing(driver.drafter, "commit_context")
    step = driver.stage.step

    def broken(batch: StepBatch) -> StepOutput:
        output = step(batch)
        if len(output.argmax) and random.random() < 0.02:
            row = random.randrange(len(output.argmax))
            output.logits[row] = output.top_logit[row] = np.nan
        return output

    driver.stage.step = broken


@pytest.mark.parametrize("seed", range(16))
def test_random_traffic_over_stages_that_fail(pair, seed):
    """Some requests fail; the others say what they say alone."""
    verifier, drafter, alone = pair
    random = Random(seed)
    driver = random_driver(random, verifier, drafter)
    make_unreliable(driver, random)
    asked = serve(driver, random)
    for one in asked:
        if not one.cancelled and one.sink.failure is None:
            assert said(one.sink, one.wanted) == alone.answer(one.wanted), one.wanted
