"""Requests of benchmarks to an engine of this process, without server and client, and a closed loop of them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence

from speculation import SpeculatingDriver

from dspark_backend.cost import CostModel
from dspark_backend.request import GenerationRequest
from speed.prompts import BenchPrompt

_LENGTHS = (0.5, 1.25, 0.75, 1.5, 1.0)
"""Of successive answers, over the mean: alike, all streams would begin and end together."""


def open_driver(given: argparse.Namespace, cost: CostModel, streams: int) -> SpeculatingDriver:
    """An engine with so many slots for the artifacts ``given``, which reuses no prompt: all policies get the same."""
    return SpeculatingDriver(
        given.verifier,
        given.drafter,
        cost,
        calibrated=True,
        max_slots=streams,
        threads=given.threads,
        kv_budget_mib=4096,
        prefix_reuse=False,
    )


def asked(prompt: BenchPrompt, tokens: int, policy: str) -> GenerationRequest:
    """For an answer of exactly so many tokens."""
    return GenerationRequest(messages=prompt.messages, max_tokens=tokens, ignore_eos=True, draft_policy=policy)


def asked_in_turn(prompts: Sequence[BenchPrompt], count: int, tokens: int, policy: str) -> list[GenerationRequest]:
    """``count`` requests, from the first prompt again after the last; answers have ``tokens`` in the mean."""
    return [
        asked(prompts[index % len(prompts)], max(2, round(tokens * _LENGTHS[index % len(_LENGTHS)])), policy)
        for index in range(count)
    ]


def busy(driver: SpeculatingDriver, requests: Sequence[GenerationRequest], streams: int) -> Iterator[int]:
    """Keep so many streams busy; yields before every step, which is the caller's, how many answers have ended.

    Ends when a stream finds no request left, and then lets the others finish.
    """
    engine, left = driver.engine, iter(requests)
    submitted = 0
    while True:
        for wanted in itertools.islice(left, streams - len(engine.roster.requests)):
            driver.submit(wanted)
            submitted += 1
        if len(engine.roster.requests) < streams:
            break
        yield submitted - streams
    while not engine.idle:
        engine.step()
