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
from tiny_text_model import write_text_model

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.delta import FinishReason
from dspark_backend.request import GenerationRequest
from dspark_backend.sequence import RequestState
from dspark_backend.stages.batch import StepBatch, StepOutput
from dspark_export.drafter import DrafterExport, export_drafter

REQUESTS = 12
SHARED = [prompt(seed, 520) for seed in range(3)]
"""Long texts, beginnings of which are prompts: rows of one request are there for another."""
UNEVEN = CostModel(
    verify=(StepCurve(1, 128, (1, 2), (1.0, 1.2)), StepCurve(16, 128, (1, 2), (2.0, 3.0))),
    draft=(StepCurve(1, 128, (1, 4), (0.1, 0.2)), StepCurve(16, 128, (1, 4), (0.2, 0.4))),
    uneven=(StepCurve(16, 128, (5,), (3.5,)),),
)
"""Drafting pays for some and not for others, wide blocks not always."""
OWN_DEPTHS = ("off", "fixed:0", "fixed:1", "fixed:3", "fixed:64", "threshold:0.2")
"""With these a seed decides the text."""
WORDS = tuple("".join(chr(33 + place % 90) for place in range(first, first + 2)) for first in range(90)) + tuple(
    "aeiotE3%$"
)
"""Some of which come in what a model of random bytes writes."""


@dataclass(eq=False)
class Asked:
    wanted: GenerationRequest
    state: RequestState
    sink: KeepingSink
    cancelled: bool = False


Said = tuple[list[int], str, list[float], FinishReason | None]


def said(sink: KeepingSink, wanted: GenerationRequest) -> list[Said]:
    """Tokens, text, log-probabilities to the last bit, and how it ended, by sequence."""
    return [
        (sink.tokens(place), sink.text(place), sink.log_probs(place), sink.reason(place))
        for place in range(wanted.num_sequences)
    ]


class Alone:
    """Every request on an engine that has nothing else to do, and where it is greedy no drafter."""

    def __init__(self, verifier: Path, drafter: Path) -> None:
        self._plain = Driver(verifier, prefix_reuse=False)
        self._drafting = SpeculatingDriver(verifier, drafter, prefix_reuse=False)
        self._whole_blocks = SpeculatingDriver(verifier, drafter, prefix_reuse=False)
        draft_whole_blocks(self._whole_blocks)

    def answer(self, wanted: GenerationRequest, by: SpeculatingDriver) -> list[Said]:
        """``by``: the driver that gave the answer in company."""
        if wanted.sampling.greedy:
            (sink,) = self._plain.run(replace(wanted, draft_policy="off", stream=True))
        else:
            alike = self._drafting if by.drafter.artifact.variable_width else self._whole_blocks
            (sink,) = alike.run(replace(wanted, stream=True))
        return said(sink, wanted)


def draft_whole_blocks(driver: SpeculatingDriver) -> None:
    """As built engines do."""
    driver.drafter._artifact = replace(driver.drafter.artifact, variable_width=False)


@pytest.fixture(scope="module", params=["qwen3_gated", "gemma4_vanilla", "qwen3_rnn"])
def pair(request, tmp_path_factory, golden_artifacts) -> tuple[Path, Path, Alone]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    verifier = golden_artifacts[name]
    if name == "qwen3_rnn":  # this one writes text
        taps = artifacts.golden_taps(name)
        verifier = artifacts.export(write_text_model(folder / "target", name), folder / "v", target_layer_ids=taps)
    drafter = folder / "drafter"
    export_drafter(DrafterExport(artifacts.GOLDEN / name / "drafter", verifier, drafter), artifacts.silent)
    return verifier, drafter, Alone(verifier, drafter)


def random_request(random: Random, driver: SpeculatingDriver) -> GenerationRequest:
    context = driver.engine.cache.max_context
    length = random.choice(
        [random.randint(1, 40), random.randint(1, 470), 255, 256, 257, 384, context - 2, context - 9]
    )
    tokens = tuple(token % 256 for token in random.choice(SHARED)[: min(length, context - 1)])
    if random.random() < 0.3 and len(tokens) < context - 9:
        tokens = (*tokens, *prompt(random.randrange(10**6), random.randint(1, 8)))
    options: dict[str, Any] = {}
    policy = random.choice(POLICIES)
    if random.random() < 0.3:
        options = {"temperature": random.choice([0.5, 1.0]), "seed": random.randrange(100)}
        options |= random.choice([{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}])
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
        (0.2, "stream", (False,)),
        (0.2, "echo", (True,)),
    ):
        if random.random() < chance:
            options[option] = random.choice(values)
    if driver.tokenizer is not None:
        for option in ("stop_words", "bad_words"):
            if random.random() < 0.3:
                options[option] = tuple(random.sample(WORDS, random.randint(1, 20)))
    longest = min(context - len(tokens), random.choice([1, 2, 3, 4, random.randint(3, 30), 40]))
    options["min_tokens"] = min(longest, options.get("min_tokens", 0))
    return ids(*tokens, max_tokens=longest, draft_policy=policy, **options)


def random_driver(random: Random, verifier: Path, drafter: Path) -> SpeculatingDriver:
    driver = SpeculatingDriver(
        verifier,
        drafter,
        cost=random.choice([CHEAP, DEAR, UNEVEN]),
        max_slots=random.choice([1, 2, 3, 5, 8]),
        prefill_chunk=random.choice([7, 64, 256, 512]),
        prefill_chunk_busy=random.choice([5, 64, 256]),
        prefix_reuse=random.random() < 0.7,
        kv_budget_mib=random.choice([1, 2, 64]),
        max_context=random.choice([0, 0, 100, 257]),
    )
    if random.random() < 0.3:
        draft_whole_blocks(driver)
    return driver


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


def check_words(one: Asked, driver: SpeculatingDriver) -> None:
    """Nothing that was forbidden is there."""
    prepared = driver.preparer.prepare(one.wanted)
    for place in range(one.wanted.num_sequences):
        tokens, text = one.sink.tokens(place), one.sink.text(place)[len(prepared.prompt_text) :]
        for word in prepared.mask.bad_words.sequences:
            assert all(tuple(tokens[at : at + len(word)]) != word for at in range(len(tokens)))
        assert one.wanted.min_tokens or not any(stop in text for stop in one.wanted.stop_words)
        assert one.wanted.min_tokens <= len(tokens) <= prepared.max_tokens


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(pair, seed, caplog):
    verifier, drafter, alone = pair
    random = Random(seed)
    driver = random_driver(random, verifier, drafter)
    with caplog.at_level(logging.WARNING):
        asked = serve(driver, random)
    assert [record.getMessage() for record in caplog.records] == []
    for one in asked:
        if not one.cancelled:
            assert said(one.sink, one.wanted) == alone.answer(one.wanted, driver), one.wanted
            check_words(one, driver)


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


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_over_stages_that_fail(pair, seed):
    """Some requests fail; the others say what they say alone."""
    verifier, drafter, alone = pair
    random = Random(seed)
    driver = random_driver(random, verifier, drafter)
    make_unreliable(driver, random)
    asked = serve(driver, random)
    for one in asked:
        if not one.cancelled and one.sink.failure is None:
            assert said(one.sink, one.wanted) == alone.answer(one.wanted, driver), one.wanted
