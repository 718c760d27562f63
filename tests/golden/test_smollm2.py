"""SmolLM2-135M-Instruct against transformers in float32: logits, and greedy answers token for token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from engines import THREADS, KeepingSink, ids, open_runner, request

from dspark_backend.runner import EngineRunner
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.check import prompt_logits
from dspark_export.compare import load_reference
from dspark_export.source import resolve_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOKENS = 64
QUESTIONS = (
    "What do bees make, and why?",
    "Write a short poem about a lighthouse in winter.",
    "Explain to a child how rain comes about.",
    "List five things to pack for a weekend in the mountains.",
    "What is the difference between a violin and a viola?",
    "Write a Python function that reverses a list in place.",
    "Summarise the story of Cinderella in three sentences.",
    "Translate into French: the cat sleeps on the warm stove.",
    "A farmer has 12 sheep and buys 7 more. How many has he now? Think step by step.",
    "Give me two arguments for and two against working at night.",
)
DECODED = (0, 2, 5, 7, 8)
"""Questions whose answers transformers writes token by token, too."""


@pytest.fixture(scope="module")
def reference() -> Any:
    pytest.importorskip("torch")
    return load_reference(resolve_model("smollm2-135m"))


@pytest.fixture(scope="module")
def runner(smollm2_artifact):
    made = open_runner(smollm2_artifact, threads=THREADS, kv_budget_mib=1024)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def prompts(runner) -> list[tuple[int, ...]]:
    """Our tokens of each chat: transformers reads this file's tokenizer wrongly."""
    messages = [json.dumps([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [runner._preparer.prepare(request(messages=text)).prompt_ids for text in messages]


@pytest.fixture(scope="module")
def answers(runner, prompts) -> list[list[int]]:
    """Our greedy answers, one request at a time."""
    return [submit(runner, prompt).wait().tokens() for prompt in prompts]


def submit(runner: EngineRunner, prompt: tuple[int, ...]) -> KeepingSink:
    sink = KeepingSink()
    runner.submit(ids(*prompt, max_tokens=TOKENS, ignore_eos=True), sink)
    return sink


def most_probable(reference: Any, prompt: tuple[int, ...], answer: list[int]) -> list[int]:
    """The most probable token of transformers after each prefix of an answer, by one pass over the whole.

    Where it equals the answer, greedy decoding with transformers gives that answer, by induction: attention is causal,
    so the logits of a position are those of its prefix whatever follows. The first token is the argmax after the
    prompt; if decoding gave the first t tokens, its next one is the argmax after this very prefix. Where it differs,
    decoding leaves the answer at the first difference: all ten answers are tested in full, in one pass each instead of
    64. The one thing that it does not run is the cache of transformers: ``test_greedy_by_decoding`` does.
    """
    import torch

    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *answer]])).logits[0]
    return logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def test_logits(smollm2_artifact, reference, prompts):
    import torch

    stage = OnnxRuntimeVerifier(smollm2_artifact, THREADS)
    token_ids = [token for prompt in prompts for token in prompt][:300]
    ours = prompt_logits(stage, token_ids, 64)
    stage.close()
    with torch.inference_mode():
        theirs = reference(torch.tensor([token_ids])).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_greedy_alone(reference, prompts, answers, number):
    assert len(answers[number]) == TOKENS
    assert most_probable(reference, prompts[number], answers[number]) == answers[number]


@pytest.mark.parametrize("number", DECODED)
def test_greedy_by_decoding(reference, prompts, answers, number):
    """The long way: token by token, with the cache of transformers."""
    import torch

    prompt = torch.tensor([prompts[number]])
    # Left to guess, transformers masks the <|im_end|> of the chat: with no end token it takes them for padding.
    mask = torch.ones_like(prompt)
    with torch.inference_mode():
        whole = reference.generate(
            prompt, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
    assert whole[0, prompt.shape[1] :].tolist() == answers[number]


def test_greedy_eight_at_once(runner, prompts, answers):
    sinks = [submit(runner, prompt) for prompt in prompts[:8]]
    assert [sink.wait(300).tokens() for sink in sinks] == answers[:8]
