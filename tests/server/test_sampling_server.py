"""Sampling options through the wire: what a client sets is what it gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from raw_calls import RawClient

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

PROMPT = "The three primary colours are"
SAMPLED = {"text_input": PROMPT, "max_tokens": 10, "temperature": 0.9, "seed": np.array([7], np.uint64)}
IDS = {"input_ids": [1, 2, 3]}


@dataclass(frozen=True)
class Answer:
    """One sequence, put together from its pieces."""

    text: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    pieces: list[str]


@pytest.fixture
def client(server):
    with RawClient(server.grpc_url) as made:
        yield made


def ask(client: RawClient, inputs: dict) -> list[Answer]:
    """Every sequence of a request, streamed; the same request in one response must say the same."""
    streamed = list(client.stream(inputs | {"stream": True}))
    count = 1 + max(piece["sequence_index"][0] for piece in streamed)
    answers = [_join([piece for piece in streamed if piece["sequence_index"] == [index]]) for index in range(count)]
    whole = client.generate(inputs | {"stream": False})
    assert whole["text_output"] == [answer.text for answer in answers]
    assert whole["output_ids"] == [token for answer in answers for token in answer.token_ids]
    assert whole["finish_reason"] == [answer.finish_reason for answer in answers]
    assert whole["num_output_tokens"] == [len(answer.token_ids) for answer in answers]
    return answers


def _join(pieces: list[dict]) -> Answer:
    texts = [piece["text_output"][0] for piece in pieces]
    return Answer(
        text="".join(texts),
        token_ids=[token for piece in pieces for token in piece["output_ids"]],
        log_probs=[value for piece in pieces for value in piece.get("output_log_probs", [])],
        finish_reason=pieces[-1]["finish_reason"][0],
        pieces=texts,
    )


def greedy(client: RawClient, **more: object) -> Answer:
    (answer,) = ask(client, {"text_input": PROMPT, "max_tokens": 12} | more)
    return answer


@pytest.fixture(scope="module")
def first(server) -> Answer:
    """What the model says to PROMPT without any options."""
    with RawClient(server.grpc_url) as client:
        return greedy(client)


def test_a_seed_gives_the_same_answer_alone_and_among_others(client):
    alone = ask(client, SAMPLED)
    others = [
        {"text_input": "Once upon a time", "max_tokens": 12},
        {"text_input": "2 + 2 =", "max_tokens": 10, "temperature": 1.3, "top_k": 40},
        SAMPLED | {"seed": np.array([8], np.uint64)},
        {"text_input": "Rain " * 60, "max_tokens": 12, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2},
        SAMPLED,
        {"text_input": PROMPT, "max_tokens": 8, "num_return_sequences": 2, "temperature": 1.0},
    ]
    with ThreadPoolExecutor(len(others)) as pool:
        together = list(pool.map(lambda inputs: list(client.stream(inputs | {"stream": True})), others))
    assert _join(together[4]).token_ids == alone[0].token_ids
    assert _join(together[2]).token_ids != alone[0].token_ids


def test_sequences_of_one_request_differ_and_are_reproducible(client):
    several = ask(client, SAMPLED | {"num_return_sequences": 3})
    assert len(several) == 3
    assert len({tuple(answer.token_ids) for answer in several}) == 3
    assert ask(client, SAMPLED)[0].token_ids == several[0].token_ids


def test_stop_words_end_the_text_before_them(client, first):
    text = first.text
    # Not at the start of a word or token: a stop string is one of characters.
    stop = text[11:19]
    assert len(stop) == 8
    end = text.index(stop)
    stopped = greedy(client, stop_words=["never to be seen", stop])
    assert stopped.text == text[:end]
    assert stopped.finish_reason == "stop"
    earliest = greedy(client, stop_words=[stop, text[3:6]])
    assert earliest.text == text[: min(end, text.index(text[3:6]))]


def test_bad_words_are_not_generated(client, first):
    word = first.text.split()[0].strip(",.:")
    assert word.isalpha()
    without = greedy(client, bad_words=[word])
    assert word not in without.text.split()
    assert without.text


def test_min_tokens_and_ignore_eos(client, first):
    messages = {"messages": '[{"role": "user", "content": "Say hello."}]', "max_tokens": 60}
    (short,) = ask(client, messages)
    assert short.finish_reason == "stop"
    length = len(short.token_ids)
    assert length < 40
    longer = client.generate(messages | {"min_tokens": length + 3})
    assert longer["num_output_tokens"][0] >= length + 3
    assert longer["output_ids"][: length - 1] == short.token_ids[:-1]
    beyond = client.generate(messages | {"ignore_eos": True, "max_tokens": length + 4})
    assert (beyond["finish_reason"], beyond["num_output_tokens"]) == (["length"], [length + 4])
    assert beyond["output_ids"][:length] == short.token_ids
    late = greedy(client, stop_words=[first.text[:3]], min_tokens=8)
    assert len(late.token_ids) >= 8


def test_echo_puts_the_prompt_first(client, first):
    echoed = greedy(client, exclude_input_in_output=False)
    assert echoed.text == PROMPT + first.text
    assert echoed.token_ids == first.token_ids
    assert echoed.pieces[0].startswith(PROMPT)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3}])
def test_log_probs_are_the_verifiers(tiny_server, options):
    """Of the unmodified distribution, whatever the sampling options are."""
    seeded = {"max_tokens": 40, "seed": np.array([3], np.uint64), "return_log_probs": True}
    with RawClient(tiny_server.grpc_url) as client:
        (answer,) = ask(client, IDS | seeded | options)
        text = np.array(IDS["input_ids"] + answer.token_ids, np.int32)
        scores = client.infer({"input_ids": text}, "verifier", ("log_probs",))["log_probs"]
        (without,) = ask(client, IDS | seeded | options | {"return_log_probs": False})
    assert len(answer.log_probs) == 40
    np.testing.assert_allclose(answer.log_probs, scores[3:], rtol=0, atol=2e-5)
    assert without.log_probs == []
    assert without.token_ids == answer.token_ids


@pytest.mark.parametrize(
    "prompt",
    [
        "🙂 😀 🎉 🚀 🙂 😀 🎉 🚀 🙂 😀 🎉 🚀 🙂 😀",
        "你好,世界。你好,世界。你好,世界。你好,",
        "こんにちは世界。こんにちは世界。こんにちは",
        "안녕하세요 세계 안녕하세요 세계 안녕하세요",
    ],
)
def test_pieces_of_characters_of_many_bytes_join_to_the_whole(client, prompt):
    (answer,) = ask(client, {"text_input": prompt, "max_tokens": 16, "ignore_eos": True})
    assert len(answer.pieces) > 10
    assert any(ord(character) > 0x2000 for character in answer.text)
    # More tokens than pieces with text: no half character was sent.
    assert sum(bool(piece) for piece in answer.pieces) < len(answer.token_ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(answer.pieces[:-1])
