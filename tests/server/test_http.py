"""Triton's HTTP ``generate`` and ``generate_stream`` over the model: what curl sees."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import numpy as np
import pytest
from raw_calls import RawClient, post
from server_state import metric, until, wait_idle

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

PROMPT = "The three primary colours are"
IDS = {"input_ids": [1, 2, 3]}


def url(server, endpoint: str = "generate") -> str:
    return f"{server.http_url}/v2/models/dspark/{endpoint}"


def test_generate_equals_generate_stream_and_grpc(server):
    whole = post(url(server), {"text_input": PROMPT, "max_tokens": 16})
    assert (whole.status, whole.content_type) == (200, "application/json")
    answer = whole.json()
    assert answer["text_output"]
    assert answer["num_output_tokens"] == len(answer["output_ids"]) <= 16
    assert answer["finish_reason"] in ("stop", "length")

    streamed = post(url(server, "generate_stream"), {"text_input": PROMPT, "max_tokens": 16, "stream": True})
    assert (streamed.status, streamed.content_type.partition(";")[0]) == (200, "text/event-stream")
    events = streamed.events()
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == answer["text_output"]
    assert ["finish_reason" in event for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["num_output_tokens"] == answer["num_output_tokens"]

    with RawClient(server.grpc_url) as client:
        assert client.generate({"text_input": PROMPT, "max_tokens": 16})["text_output"] == [answer["text_output"]]


def test_messages_are_rendered_with_the_chat_template(server):
    messages = json.dumps([{"role": "user", "content": "Say hello."}])
    answer = post(url(server), {"messages": messages, "max_tokens": 8}).json()
    plain = post(url(server), {"text_input": "Say hello.", "max_tokens": 8}).json()
    assert answer["text_output"]
    assert answer["num_input_tokens"] > plain["num_input_tokens"]


def test_several_sequences_come_as_lists_in_order(tiny_server):
    asked = IDS | {"max_tokens": 5, "temperature": 1.0, "seed": 3, "num_return_sequences": 3}
    answer = post(url(tiny_server), asked).json()
    assert answer["sequence_index"] == [0, 1, 2]
    assert answer["num_output_tokens"] == [5, 5, 5]
    assert answer["finish_reason"] == ["length"] * 3
    assert answer["num_input_tokens"] == 3
    for name in ("text_output", "acceptance_rate", "total_draft_tokens", "num_rounds", "last_token_time_ns"):
        assert len(answer[name]) == 3, name
    whole = [answer["output_ids"][start : start + 5] for start in (0, 5, 10)]
    assert len({tuple(ids) for ids in whole}) > 1

    pieces: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for event in post(url(tiny_server, "generate_stream"), asked | {"stream": True}).events():
        ids = event["output_ids"]
        pieces[event["sequence_index"]] += ids if isinstance(ids, list) else [ids]
    assert list(pieces.values()) == whole


def test_without_stream_there_is_one_response(tiny_server):
    for unset in ({}, {"stream": False}):
        (event,) = post(url(tiny_server, "generate_stream"), IDS | {"max_tokens": 6} | unset).events()
        assert event["output_ids"] == post(url(tiny_server), IDS | {"max_tokens": 6}).json()["output_ids"]


def test_a_disconnect_cancels(tiny_server):
    wait_idle(tiny_server)
    cancelled = metric(tiny_server, "requests_finished_total", reason="cancelled")
    body = json.dumps(IDS | {"max_tokens": 500, "stream": True}).encode()
    address = urlsplit(tiny_server.http_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v2/models/dspark/generate_stream HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(256).startswith(b"HTTP/1.1 200")
    until(
        lambda: metric(tiny_server, "requests_finished_total", reason="cancelled") == cancelled + 1,
        10,
        "a cancellation",
    )
    wait_idle(tiny_server)


def test_unset_inputs_take_the_documented_defaults(server, tiny_server):
    defaults = {
        "min_tokens": 0,
        "stream": False,
        "exclude_input_in_output": True,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": False,
        "return_log_probs": False,
        "num_return_sequences": 1,
        "priority": 0,
    }
    asked = {"text_input": PROMPT, "max_tokens": 12}
    unset, spelled = (post(url(server), asked | more).json() for more in ({}, defaults))
    untimed = [{k: v for k, v in answer.items() if not k.endswith("_ns")} for answer in (unset, spelled)]
    assert untimed[0] == untimed[1]
    assert PROMPT not in unset["text_output"]
    assert "output_log_probs" not in unset
    # max_tokens: the engine's default_max_tokens, or less where the context ends before.
    assert post(url(tiny_server), IDS).json()["num_output_tokens"] == 256
    assert post(url(tiny_server), {"input_ids": [1] * 400}).json()["num_output_tokens"] == 112


def test_an_unset_seed_is_random(tiny_server):
    asked = IDS | {"max_tokens": 12, "temperature": 1.0}
    answers = {tuple(post(url(tiny_server), asked).json()["output_ids"]) for _ in range(4)}
    assert len(answers) == 4
    seeded = {tuple(post(url(tiny_server), asked | {"seed": 2**64 - 1}).json()["output_ids"]) for _ in range(3)}
    assert len(seeded) == 1


def test_log_probs_are_numbers(tiny_server):
    answer = post(url(tiny_server), IDS | {"max_tokens": 4, "return_log_probs": True}).json()
    assert len(answer["output_log_probs"]) == 4
    assert np.all(np.array(answer["output_log_probs"]) < 0)
