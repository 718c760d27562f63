"""What a server says to requests that cannot work: message and code of each, and that it serves on."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from raw_calls import RawClient, Refused, Tensor, post
from refusals import ANSWER, IDS, invalid, refusal

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

VOCABULARY, CONTEXT = 384, 512


@pytest.fixture
def tiny(tiny_server):
    """A client of the tiny model; afterwards the server must answer as ever."""
    with RawClient(tiny_server.grpc_url) as client:
        yield client
        assert client.generate(IDS | {"max_tokens": 4})["output_ids"] == ANSWER


@pytest.fixture
def smol(server):
    """A client of a model with a tokenizer; afterwards the server must answer."""
    with RawClient(server.grpc_url) as client:
        yield client
        assert client.generate({"text_input": "One, two, three,", "max_tokens": 2})["text_output"] == [" four,"]


def test_no_prompt(tiny):
    expected = invalid("expected exactly one of text_input, input_ids and messages, got none")
    assert refusal(tiny, {}) == expected
    assert refusal(tiny, {"max_tokens": 4}) == expected


def test_two_prompts(tiny):
    message = refusal(tiny, IDS | {"text_input": "hello"})
    assert message == invalid(
        "expected exactly one of text_input, input_ids and messages, got text_input and input_ids"
    )


def test_empty_prompts(tiny, smol):
    assert refusal(tiny, {"input_ids": np.zeros(0, np.int32)}) == invalid(
        "input_ids: expected at least one token, got none"
    )
    assert refusal(smol, {"text_input": ""}) == invalid("prompt: expected at least one token, got an empty prompt")


def test_a_prompt_of_ids_beyond_the_context(tiny):
    longest = {"input_ids": [1] * (CONTEXT - 1), "max_tokens": 8}
    assert tiny.generate(longest)["num_output_tokens"] == [1]
    for length in (CONTEXT, 1_000_000):
        assert refusal(tiny, {"input_ids": [1] * length}) == invalid(
            f"prompt: expected at most {CONTEXT - 1} tokens (the context holds {CONTEXT}, one is for the answer), "
            f"got {length}; shorten the prompt"
        )


def test_a_prompt_of_text_beyond_the_context(smol):
    message = refusal(smol, {"text_input": "word " * 20_000})
    assert message.startswith(invalid("prompt: expected at most 8191 tokens"))
    assert message.endswith("shorten the prompt")


def test_a_mebibyte_of_text(smol):
    begin = time.monotonic()
    message = refusal(smol, {"text_input": "x" * 2**20})
    assert time.monotonic() - begin < 2.0
    assert message == invalid(
        "text_input: expected at most 131072 bytes (a context of 8192 tokens), got 1048576; shorten the prompt"
    )


@pytest.mark.parametrize("count", [0, -1, -(2**31)])
def test_max_tokens(tiny, count):
    assert refusal(tiny, IDS | {"max_tokens": count}) == invalid(f"max_tokens: expected at least 1, got {count}")


def test_min_tokens(tiny):
    assert refusal(tiny, IDS | {"min_tokens": -1}) == invalid("min_tokens: expected at least 0, got -1")
    assert refusal(tiny, IDS | {"min_tokens": 9, "max_tokens": 8}) == invalid(
        "min_tokens: expected at most max_tokens (8), got 9"
    )
    assert refusal(tiny, IDS | {"min_tokens": CONTEXT}).startswith(invalid("min_tokens: expected at most 509"))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("temperature", -1.0, "expected 0 (greedy) to 100, got -1.0"),
        ("temperature", 101.0, "expected 0 (greedy) to 100, got 101.0"),
        ("temperature", float("nan"), "expected a finite number, got nan"),
        ("temperature", float("inf"), "expected a finite number, got inf"),
        ("top_p", 0.0, "expected a number in (0, 1], got 0.0"),
        ("top_p", -0.5, "expected a number in (0, 1], got -0.5"),
        ("top_p", 1.5, "expected a number in (0, 1], got 1.5"),
        ("top_p", float("nan"), "expected a finite number, got nan"),
        ("top_k", -2, "expected a count, or 0 or -1 for all tokens, got -2"),
        ("min_p", -0.5, "expected a number in [0, 1], got -0.5"),
        ("min_p", 2.0, "expected a number in [0, 1], got 2.0"),
        ("repetition_penalty", 0.0, "expected a number in [0.01, 100], got 0.0"),
        ("presence_penalty", 1000.0, "expected a number in [-100, 100], got 1000.0"),
        ("frequency_penalty", float("-inf"), "expected a finite number, got -inf"),
        ("num_return_sequences", 0, "expected 1 to 64, got 0"),
        ("num_return_sequences", 65, "expected 1 to 64, got 65"),
        ("timeout_ms", 0, "expected at least 1, got 0"),
    ],
)
def test_values_out_of_range(tiny, name, value, wanted):
    message = refusal(tiny, IDS | {name: value})
    assert message == invalid(f"{name}: {wanted}")


def test_more_sequences_than_slots(tiny):
    assert refusal(tiny, IDS | {"num_return_sequences": 17}) == invalid(
        "num_return_sequences: expected at most 16 (the engine's max_slots), got 17"
    )


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([1, -2], "expected token ids from 0, got -2"),
        ([1, VOCABULARY], f"ids from 0 to {VOCABULARY - 1}, got {VOCABULARY} at index 1"),
        ([2**31 - 1], f"ids from 0 to {VOCABULARY - 1}, got {2**31 - 1} at index 0"),
    ],
)
def test_token_ids_outside_the_vocabulary(tiny, ids, wanted):
    message = refusal(tiny, {"input_ids": ids})
    assert message.startswith(invalid("input_ids: expected "))
    assert message.endswith(wanted)


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ('[{"role": "user", "content": "hi", "colour": 1}]', "messages[0]: unknown key 'colour'; expected role"),
        ('[{"role": "user", "content"', "messages: expected a JSON list of messages, got malformed JSON"),
        ('{"role": "user", "content": "hi"}', "messages: expected a JSON list of messages, got an object"),
        ('"hi"', "messages: expected a JSON list of messages, got a string"),
        ("[]", "messages: expected at least one message, got an empty list"),
        ('["hi"]', "messages[0]: expected an object with role and content, got a string"),
        ('[{"role": "user"}]', "messages[0]: expected content, got none"),
        ('[{"role": 3, "content": "hi"}]', "messages[0].role: expected a string, got a number"),
        ("[" * 100_000, "messages: expected a JSON list of messages, got malformed JSON"),
        ("", "messages: expected a JSON list of messages, got malformed JSON"),
        (b"[\xff]", "messages: expected UTF-8 text, got invalid bytes at offset 1"),
    ],
)
def test_messages(smol, messages, wanted):
    assert refusal(smol, {"messages": messages}).startswith(invalid(wanted))


def test_text_that_is_not_utf8(tiny, smol):
    expected = invalid("text_input: expected UTF-8 text, got invalid bytes at offset 2")
    assert refusal(tiny, {"text_input": b"ab\xff"}) == expected
    assert refusal(smol, {"text_input": b"ab\xff"}) == expected
    assert refusal(smol, {"text_input": "x", "stop_words": [b"a", b"\xc3"]}) == invalid(
        "stop_words: expected UTF-8 text, got invalid bytes at offset 0"
    )


def test_text_to_a_model_without_a_tokenizer(tiny):
    without = "this model was exported without a tokenizer"
    assert refusal(tiny, {"text_input": "hi"}) == invalid(f"text_input: {without}; send input_ids instead")
    assert refusal(tiny, {"messages": "[]"}) == invalid(f"messages: {without}; send input_ids instead")
    assert refusal(tiny, IDS | {"stop_words": ["x"]}) == invalid(f"stop_words: expected none, {without}")
    assert refusal(tiny, IDS | {"bad_words": ["x"]}) == invalid(f"bad_words: expected none, {without}")


def test_stop_and_bad_words(smol):
    prompt = {"text_input": "hello"}
    empty = "expected non-empty strings, got an empty one"
    assert refusal(smol, prompt | {"stop_words": ["x"] * 10_000}) == invalid(
        "stop_words: expected at most 64 entries, got 10000"
    )
    assert refusal(smol, prompt | {"bad_words": ["x"] * 257}) == invalid(
        "bad_words: expected at most 256 entries, got 257"
    )
    assert refusal(smol, prompt | {"stop_words": [""]}) == invalid(f"stop_words: {empty}")
    assert refusal(smol, prompt | {"bad_words": ["a", ""]}) == invalid(f"bad_words: {empty}")
    assert refusal(smol, prompt | {"stop_words": ["x" * 1025]}) == invalid(
        "stop_words: expected entries of at most 1024 characters, got one of 1025"
    )


# What Triton's core refuses before the model sees it: the messages and codes are its own.


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        (
            {"input_ids": np.array([1, 2], np.int64)},
            "input 'input_ids' data-type is 'INT64', but model 'dspark' expects",
        ),
        (IDS | {"temperature": 1}, "input 'temperature' data-type is 'INT32', but model 'dspark' expects 'FP32'"),
        ({"input_ids": np.array([[1, 2]], np.int32)}, "unexpected shape for input 'input_ids' for model 'dspark'"),
        (
            IDS | {"max_tokens": [1, 2]},
            "unexpected shape for input 'max_tokens' for model 'dspark'. Expected [1], got [2]",
        ),
        (IDS | {"max_tokens": np.zeros(0, np.int32)}, "unexpected shape for input 'max_tokens'"),
        ({"input_ids": Tensor("INT32", (4,), b"\0" * 8)}, "input byte size mismatch for input 'input_ids'"),
        ({"text_input": Tensor("BYTES", (1,), b"\xff\xff\xff\x7fabc")}, "incomplete string data for inference input"),
        (IDS | {"colour": 1}, "unexpected inference input 'colour' for model 'dspark'"),
    ],
)
def test_tensors_that_do_not_fit_the_model(tiny, inputs, wanted):
    message = refusal(tiny, inputs)
    assert wanted in message


def test_an_unknown_model(tiny):
    with pytest.raises(Refused, match="unknown model: 'nobody'"):
        list(tiny.stream(IDS, model="nobody"))


def test_a_unary_call(tiny):
    with pytest.raises(Refused, match="doesn't support models with decoupled transaction policy") as refused:
        tiny.infer(IDS, "dspark")
    assert refused.value.code == "UNIMPLEMENTED"


# HTTP.


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"max_tokens": 4}, "expected exactly one of text_input, input_ids and messages, got none"),
        (IDS | {"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        (IDS | {"temperature": -1}, "temperature: expected 0 (greedy) to 100, got -1.0"),
        ({"input_ids": [VOCABULARY]}, "ids from 0 to 383, got 384 at index 0"),
        ({"text_input": "hi"}, "text_input: this model was exported without a tokenizer; send input_ids instead"),
    ],
)
def test_http_answers_bad_values_with_400(tiny_server, tiny, endpoint, body, wanted):
    answer = post(f"{tiny_server.http_url}/v2/models/dspark/{endpoint}", body)
    assert answer.status == 400
    (error,) = answer.events() if endpoint == "generate_stream" else [answer.json()]
    assert list(error) == ["error"]
    assert error["error"].startswith("[INVALID_ARGUMENT] ")
    assert error["error"].endswith(wanted)


@pytest.mark.parametrize("body", [b"{bad", b"[]", b"", json.dumps({"input_ids": "x"}).encode()])
def test_http_answers_what_is_no_request_with_an_error(tiny_server, tiny, body):
    answer = post(f"{tiny_server.http_url}/v2/models/dspark/generate", body)
    # Triton's own parser answers these, some of them as 500.
    assert answer.status in (400, 500)
    assert list(answer.json()) == ["error"]
    assert "Traceback" not in answer.body
