"""SmolLM2 with drafters that are nearly always wrong: real text, every policy, alone and in a full batch."""

from __future__ import annotations

from pathlib import Path

import artifacts
import pytest
from engines import THREADS, Driver, request
from random_drafter import write_random_drafter
from speculation import POLICIES, SpeculatingDriver

from dspark_backend.request import GenerationRequest
from dspark_export.drafter import DrafterExport, export_drafter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HEADS = ("vanilla", "gated", "rnn")
TOKENS = 12
SETTINGS = {"threads": THREADS, "kv_budget_mib": 1024, "max_context": 128}
TEXTS = (
    "Why is the sky blue?",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "1 + 1 =",
    "Les élèves écoutent la maîtresse 🎈 et",
    "The three laws of motion say that a body at rest stays at rest, that force is mass times acceleration, and that",
    '{"name": "Ada", "born": ',
    "Q: What is the capital of France?\nA:",
)
COMPANIONS = (
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.2, "presence_penalty": 0.8, "frequency_penalty": 0.4},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "log_probs": True},
)


def greedy(text: str) -> GenerationRequest:
    return request(text=text, max_tokens=TOKENS, ignore_eos=True)


def companion(index: int) -> GenerationRequest:
    """A sampled request; no two have the same settings."""
    return request(
        text=f"Chapter {index}: {TEXTS[index]}", max_tokens=TOKENS, ignore_eos=True, seed=index, **COMPANIONS[index]
    )


@pytest.fixture(scope="module")
def expected(smollm2_artifact) -> list[list[int]]:
    """The greedy answers of an engine without a drafter, one request at a time."""
    driver = Driver(smollm2_artifact, **SETTINGS)
    return [driver.run(greedy(text))[0].tokens() for text in TEXTS]


@pytest.fixture(scope="module")
def drafters(smollm2_artifact, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafters")
    for head in HEADS:
        checkpoint = write_random_drafter(smollm2_artifact, root / f"{head}-checkpoint", head=head)
        export_drafter(DrafterExport(checkpoint, smollm2_artifact, root / head), artifacts.silent)
    return {head: root / head for head in HEADS}


@pytest.mark.parametrize(
    ("policy", "head"), [(policy, HEADS[place % len(HEADS)]) for place, policy in enumerate(POLICIES)]
)
def test_greedy_text_is_that_of_off(smollm2_artifact, drafters, expected, policy, head):
    driver = SpeculatingDriver(smollm2_artifact, drafters[head], policy=policy, **SETTINGS)
    for place in (1, 4):
        (sink,) = driver.run(greedy(TEXTS[place]))
        assert sink.tokens() == expected[place], TEXTS[place]
    pairs = [(greedy(text), companion(index)) for index, text in enumerate(TEXTS)]
    sinks = [driver.submit(one)[1] for pair in pairs for one in pair]
    together = 0
    while not driver.engine.idle:
        driver.engine.step()
        together = max(together, len(driver.engine.cache.active))
    assert together == 16
    assert [sink.tokens() for sink in sinks[::2]] == expected
    assert all(len(sink.tokens()) == TOKENS for sink in sinks[1::2])
    assert all(sink.text() for sink in sinks)
    assert not driver.engine.cache.active
    metrics = driver.engine.metrics
    assert (metrics.spec_decode_num_drafts_total.value > 0) == (policy != "off")
