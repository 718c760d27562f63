"""Requests that can never succeed are refused with the field, the range and the value."""

from __future__ import annotations

import math

import pytest

from dspark_backend.errors import InvalidRequest, Status
from dspark_backend.request import MAX_BAD_WORDS, MAX_STOP_STRINGS, MAX_WORD_CHARS, GenerationRequest, SamplingParams

BAD_SAMPLING = [
    ("temperature", -0.1, "0 .greedy. to 100"),
    ("temperature", 100.5, "0 .greedy. to 100"),
    ("top_k", -2, "0 or -1 for all"),
    ("top_p", 0.0, r"\(0, 1\]"),
    ("top_p", 1.01, r"\(0, 1\]"),
    ("min_p", -0.01, r"\[0, 1\]"),
    ("min_p", 1.01, r"\[0, 1\]"),
    ("repetition_penalty", 0.0, r"\[0.01, 100\]"),
    ("repetition_penalty", 101.0, r"\[0.01, 100\]"),
    ("presence_penalty", -100.5, r"\[-100, 100\]"),
    ("frequency_penalty", 100.5, r"\[-100, 100\]"),
    ("seed", -1, "unsigned 64-bit"),
    ("seed", 2**64, "unsigned 64-bit"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_SAMPLING)
def test_sampling_out_of_range(name, value, expected):
    with pytest.raises(InvalidRequest, match=f"^{name}: expected .*{expected}.*, got {value}$") as caught:
        SamplingParams(**{name: value})
    assert caught.value.status is Status.INVALID_ARGUMENT


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
def test_sampling_must_be_finite(name, value):
    with pytest.raises(InvalidRequest, match=f"^{name}: expected a finite number, got {value}$"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 100.0),
        ("top_k", -1),
        ("top_p", 1e-30),
        ("min_p", 1.0),
        ("repetition_penalty", 0.01),
        ("presence_penalty", -100.0),
        ("seed", 2**64 - 1),
    ],
)
def test_the_ends_of_ranges_are_inside(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_derived_properties():
    assert SamplingParams().greedy and not SamplingParams().penalises
    assert not SamplingParams(temperature=0.1).greedy
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 0.5}).penalises


BAD_REQUESTS = [
    ({}, "exactly one of text_input, input_ids and messages, got none"),
    ({"text": "a", "messages": "[]"}, "got text_input and messages"),
    ({"text": "a", "input_ids": (1,), "messages": "[]"}, "got text_input and input_ids and messages"),
    ({"input_ids": ()}, "input_ids: expected at least one token, got none"),
    ({"input_ids": (4, -7)}, "input_ids: expected token ids from 0, got -7"),
    ({"text": "a", "max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
    ({"text": "a", "min_tokens": -1}, "min_tokens: expected at least 0, got -1"),
    ({"text": "a", "min_tokens": 6, "max_tokens": 5}, r"min_tokens: expected at most max_tokens \(5\), got 6"),
    ({"text": "a", "num_sequences": 0}, "num_return_sequences: expected 1 to 64, got 0"),
    ({"text": "a", "num_sequences": 65}, "num_return_sequences: expected 1 to 64, got 65"),
    ({"text": "a", "timeout_ms": 0}, "timeout_ms: expected at least 1, got 0"),
    ({"text": "a", "stop_words": ("x", "")}, "stop_words: expected non-empty strings"),
    ({"text": "a", "stop_words": ("x",) * (MAX_STOP_STRINGS + 1)}, "stop_words: expected at most 64 entries, got 65"),
    ({"text": "a", "bad_words": ("x",) * (MAX_BAD_WORDS + 1)}, "bad_words: expected at most 256 entries, got 257"),
    ({"text": "a", "bad_words": ("x" * (MAX_WORD_CHARS + 1),)}, "bad_words: expected entries of at most 1024"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_REQUESTS)
def test_impossible_requests(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        GenerationRequest(**fields)


@pytest.mark.parametrize("prompt", [{"text": ""}, {"input_ids": (0,)}, {"messages": "[]"}])
def test_each_form_of_prompt(prompt):
    request = GenerationRequest(**prompt, max_tokens=3, min_tokens=3, timeout_ms=1, num_sequences=64)
    assert request.sampling.greedy
