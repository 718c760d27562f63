"""Scores of a prompt against logits computed directly."""

from __future__ import annotations

import numpy as np
import pytest
from schedules import plain_logits

from dspark_backend.errors import InvalidRequest
from dspark_backend.scoring import CHUNK, score
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier


@pytest.fixture(scope="module")
def stage(golden_artifacts) -> OnnxRuntimeVerifier:
    return OnnxRuntimeVerifier(golden_artifacts["qwen3_rnn"], 1)


@pytest.mark.parametrize("length", [1, 2, 40, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_equals_direct_logits(stage, length):
    tokens = np.random.default_rng(length).integers(0, 300, length).tolist()
    logits = plain_logits(stage, tokens)
    found = score(stage, tokens, want_logits=True)
    assert found.logits is not None and found.logits.tobytes() == logits.tobytes()
    assert (found.argmax == logits.argmax(axis=1)).all()
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    expected = [0.0, *(log_softmax[at, token] for at, token in enumerate(tokens[1:]))]
    np.testing.assert_allclose(found.log_probs, expected, rtol=0, atol=1e-6)


def test_logits_only_where_asked(stage):
    assert score(stage, [1, 2, 3], want_logits=False).logits is None


def test_prompts_do_not_leak_into_each_other(stage):
    first = score(stage, [5, 6, 7], want_logits=True).logits
    score(stage, list(range(200)), want_logits=False)
    assert score(stage, [5, 6, 7], want_logits=True).logits.tobytes() == first.tobytes()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "expected 1 to 512 tokens, got 0"),
        ([1] * 513, "expected 1 to 512 tokens, got 513"),
        ([300], "expected ids from 0 to 299, got 300"),
        ([0, -1], "expected ids from 0 to 299, got -1"),
    ],
)
def test_errors(stage, tokens, message):
    with pytest.raises(InvalidRequest, match=f"input_ids: {message}"):
        score(stage, tokens, want_logits=False)
