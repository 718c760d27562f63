"""What the quickstart serves, int8 and the shipped drafter: greedy text with speculation is greedy text without it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import pytest
from raw_calls import RawClient

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = 50
TOKENS = 128
STREAMS = 16


@pytest.fixture(scope="module")
def server(make_server, served_pair, tmp_path_factory):
    verifier, drafter = served_pair
    parameters = {"cost_cache": str(tmp_path_factory.mktemp("cost")), "profile_seconds": "5"}
    made = make_server(verifier, drafter=drafter, parameters=parameters)
    yield made
    made.process.stop()


@pytest.fixture(scope="module")
def questions() -> list[str]:
    """User turns of everyday, school mathematics and Python, as JSON messages."""
    text = files("dspark_export").joinpath("data", "dialogues.jsonl").read_text(encoding="utf-8")
    turns = [json.loads(line)["messages"][:1] for line in text.splitlines()]
    return [json.dumps(turn) for turn in turns[:PROMPTS]]


def ask(server: Any, questions: list[str], policy: str, streams: int) -> list[dict[str, Any]]:
    """Answers in the order of the questions."""

    def one(messages: str) -> dict[str, Any]:
        with RawClient(server.grpc_url) as client:
            return client.generate(
                {"messages": messages, "max_tokens": TOKENS, "ignore_eos": True, "draft_policy": policy}
            )

    with ThreadPoolExecutor(streams) as pool:
        return list(pool.map(one, questions))


@pytest.fixture(scope="module")
def expected(server, questions) -> list[list[int]]:
    """Without speculation, in smaller batches."""
    answers = ask(server, questions, "off", 7)
    assert all(answer["total_draft_tokens"] == [0] for answer in answers)
    return [answer["output_ids"] for answer in answers]


@pytest.mark.parametrize("policy", ["fixed:5", "causal", "lagged"])
def test_greedy_text_is_that_of_off(server, questions, expected, policy):
    answers = ask(server, questions, policy, STREAMS)
    assert [answer["output_ids"] for answer in answers] == expected
    assert all(len(tokens) == TOKENS for tokens in expected)
    if policy == "fixed:5":
        rounds, accepted = (
            sum(answer[key][0] for answer in answers) for key in ("num_rounds", "total_accepted_draft_tokens")
        )
        assert accepted > 0.2 * rounds, "the drafter has learnt something"
