"""A server that speculates, with the golden drafter: tokens, counts, metrics, and clients that leave mid-round."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from artifacts import golden_arrays
from raw_calls import RawClient, tensors_of
from refusals import refusal
from server_state import PUBLISHED_MS, metric, read_metrics, regions_of, stub_of, until, wait_idle

from dspark_backend.metrics import EngineMetrics

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

NAME = "qwen3_vanilla"
BLOCK = 7
POLICIES = ("off", "fixed:1", "fixed:3", "fixed:64", "threshold:0.2", "threshold:0.9", "causal", "lagged", None)


@pytest.fixture
def client(speculating) -> Iterator[RawClient]:
    with RawClient(speculating.grpc_url) as made:
        yield made


def golden_request(policy: str | None = None, cap: int | None = None, **options: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": golden_arrays(NAME)["prompt"].astype(np.int32), "max_tokens": 60, **options}
    if policy is not None:
        inputs["draft_policy"] = policy
    if cap is not None:
        inputs["max_draft_tokens"] = cap
    return inputs


def golden_tokens() -> list[int]:
    return golden_arrays(NAME)["greedy"].tolist()


def check_counts(answer: dict[str, list[Any]], policy: str | None, cap: int | None) -> None:
    """The summary of a finished request adds up."""
    (drafted,) = answer["total_draft_tokens"]
    (verified,) = answer["total_verified_draft_tokens"]
    (accepted,) = answer["total_accepted_draft_tokens"]
    (rounds,) = answer["num_rounds"]
    assert answer["num_output_tokens"] == [1 + rounds + accepted], "the prompt's token, and one more than stood a round"
    assert 0 <= accepted <= verified <= drafted <= BLOCK * rounds
    if policy == "off" or cap == 0:
        assert drafted == 0
    elif policy is not None and policy.startswith(("fixed", "threshold")):
        # Static policies draft in every round but the last, behind whose single token nothing is left to say, and as
        # far as they may verify.
        width = min(BLOCK, BLOCK if cap is None else cap)
        if policy.startswith("fixed:"):
            width = min(width, int(policy.removeprefix("fixed:")))
        assert drafted in (width * rounds, width * (rounds - 1))
    rate = accepted / verified if verified else 0.0
    assert answer["acceptance_rate"] == [pytest.approx(rate)]


@pytest.mark.parametrize("cap", [None, 0, 2, 1000])
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_tokens_are_the_references(client, policy, cap):
    answer = client.generate(golden_request(policy, cap))
    assert answer["output_ids"] == golden_tokens()
    check_counts(answer, policy, cap)


def test_rounds_accept_what_the_reference_accepts(client):
    """Responses end where rounds end (several rounds share one where sending lags), and nowhere else."""
    pieces = list(client.stream(golden_request("fixed:64", stream=True)))
    assert [token for piece in pieces for token in piece["output_ids"]] == golden_tokens()
    accepted = golden_arrays(NAME)["e2e_accepted_per_round"]
    ends = {1, *(1 + np.cumsum(accepted + 1)).tolist()}
    found = np.cumsum([len(piece["output_ids"]) for piece in pieces]).tolist()
    assert {end for end in found if end <= max(ends)} <= ends
    assert len(set(found) & ends) >= 3


@pytest.mark.parametrize("rounds", [1, 5, 12, 20])
def test_so_many_rounds_yield_what_the_reference_yields(client, rounds):
    accepted = golden_arrays(NAME)["e2e_accepted_per_round"][:rounds]
    # One token more than these rounds yield: the limit, which trims last blocks, then trims none of what they accept.
    tokens = 1 + int((accepted + 1).sum())
    answer = client.generate(golden_request("fixed:64", max_tokens=tokens + 1))
    assert answer["num_output_tokens"] == [tokens + 1] and answer["output_ids"] == golden_tokens()[: tokens + 1]
    assert answer["num_rounds"] == [rounds + 1]


def test_counts_of_several_sequences_are_their_own(client):
    answer = client.generate(golden_request("fixed:3", num_return_sequences=3, temperature=1.0))
    assert len(answer["num_rounds"]) == 3
    for index in range(3):
        names = ("total_draft_tokens", "total_verified_draft_tokens", "total_accepted_draft_tokens", "num_rounds")
        own = {name: [answer[name][index]] for name in (*names, "num_output_tokens", "acceptance_rate")}
        check_counts(own, "fixed:3", None)


def prompts(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 384, int(length)).astype(np.int32) for length in rng.integers(5, 120, count)]


def request_of(index: int, prompt: np.ndarray, policy: str) -> dict[str, Any]:
    """Even ones are greedy, odd ones sampled; no two share prompt and seed."""
    inputs: dict[str, Any] = {"input_ids": prompt, "max_tokens": 150, "draft_policy": policy}
    if index % 2:
        inputs |= {"temperature": 1.0, "top_p": 0.95, "seed": np.array([index], np.uint64)}
    return inputs


def leave(server, inputs: dict[str, Any], rng: random.Random) -> None:
    """Read a part of the answer, then cancel the call or close the channel."""
    with RawClient(server.grpc_url) as own:
        call = own.open_stream(inputs | {"stream": True})
        for _ in range(rng.randint(1, 12)):
            assert not next(call).error_message
        time.sleep(rng.random() * 0.01)
        if rng.random() < 0.5:
            call.cancel()


MIXED = ("off", "fixed:1", "fixed:64", "threshold:0.2", "causal", "lagged")


@pytest.mark.parametrize("policy", ["fixed:3", "threshold:0.2", "causal", "lagged", "mixed"])
def test_clients_that_leave_mid_round_disturb_nobody(speculating, policy):
    server, count = speculating, 16
    seed = sum(policy.encode())
    rng = random.Random(seed)
    policies = [MIXED[index % len(MIXED)] if policy == "mixed" else policy for index in range(count)]
    asked = [request_of(index, prompt, policies[index]) for index, prompt in enumerate(prompts(count, seed))]
    leavers = set(rng.sample(range(count), 6))
    endless = {"input_ids": [9, 8, 7], "max_tokens": 500, "temperature": 1.0, "stream": True}
    with RawClient(server.grpc_url) as client, RawClient(server.grpc_url) as silent, ThreadPoolExecutor(count) as pool:
        greedy = {
            index: client.generate(asked[index] | {"draft_policy": "off"})["output_ids"] for index in range(0, count, 2)
        }
        # A fixed depth consumes a sequence's random numbers in the same way whatever else runs.
        fixed = [index for index in range(1, count, 2) if policies[index].startswith(("fixed", "off"))]
        sampled = {index: client.generate(asked[index])["output_ids"] for index in fixed}
        wait_idle(server)
        stub, regions = stub_of(server), regions_of(server)
        threads, files = stub.num_threads(), stub.num_fds()

        unread = silent.open_stream(endless | {"num_return_sequences": 4, "draft_policy": policies[0]})
        assert not next(unread).error_message
        for _ in range(2):
            jobs = {
                index: pool.submit(leave, server, asked[index], random.Random(index))
                if index in leavers
                else pool.submit(client.generate, asked[index])
                for index in range(count)
            }
            answers = {index: job.result() for index, job in jobs.items()}
            for index in set(range(count)) - leavers:
                expected = greedy.get(index, sampled.get(index))
                assert expected is None or answers[index]["output_ids"] == expected, (index, policies[index])
                check_counts(answers[index], policies[index], None)
            # The adaptive policies rest where drafting does not pay, but look again now and then.
            assert any(answer["total_draft_tokens"][0] for answer in answers.values() if answer)
        until(lambda: metric(server, "num_requests_running") == 0, 60, "the unread request is finished")
        responses = [tensors_of(response.infer_response) for response in unread]
        assert sum("finish_reason" in response for response in responses) == 4
        wait_idle(server)
        assert (stub.num_threads(), stub.num_fds()) == (threads, files)
        assert regions_of(server) == regions
        assert stub_of(server).pid == stub.pid and server.process.poll() is None
        assert client.generate(golden_request(policies[0]))["output_ids"] == golden_tokens()


# The part of a name behind dspark_spec_decode_.
COUNTERS = (
    "num_drafts_total",
    "num_draft_tokens_total",
    "num_verified_tokens_total",
    "num_accepted_tokens_total",
    "drafter_skips_total",
    "draft_seconds_total",
    "verify_budget",
    "trim_ratio",
    "calibration_error",
)
BY_PLACE = ("num_verified_tokens_per_pos_total", "num_accepted_tokens_per_pos_total")
OTHERS = ("dspark_predicted_step_seconds_total", "dspark_cost_model_error")


def spec_metrics() -> list[tuple[str, dict[str, str]]]:
    """Name and labels of all that speculation publishes."""
    plain = [*(f"dspark_spec_decode_{name}" for name in COUNTERS), *OTHERS]
    places = [(f"dspark_spec_decode_{name}", {"position": str(place)}) for name in BY_PLACE for place in range(BLOCK)]
    return [*((name, {}) for name in plain), *places]


def read_all(server) -> dict[str, float]:
    """All speculative counters, by name and position."""
    time.sleep(5 * PUBLISHED_MS / 1000)
    return {
        f"{name}{labels.get('position', '')}": metric(server, name[7:], **labels) for name, labels in spec_metrics()
    }


def test_the_endpoint_carries_the_speculative_metrics(speculating):
    own = {"model": "dspark", "version": "1"}
    found = {(sample.name, frozenset(dict(sample.labels).items())) for sample in read_metrics(speculating)}
    declared = [(name, dict(item.labels)) for name, item in EngineMetrics(BLOCK).items() if "_spec_" in name]
    assert [one for one in declared if one not in spec_metrics()] == [], "metrics that this test should know"
    for name, labels in spec_metrics():
        assert (name, frozenset((own | labels).items())) in found, name


def test_metrics_count_what_the_client_is_told(speculating, client):
    wait_idle(speculating)
    before = read_all(speculating)
    answers = [client.generate(golden_request(policy)) for policy in ("fixed:64", "fixed:2", "off", "causal")]
    after = read_all(speculating)
    grown = {name.removeprefix("dspark_spec_decode_"): after[name] - before[name] for name in before}

    def told(name: str) -> int:
        return sum(answer[name][0] for answer in answers)

    assert grown["num_draft_tokens_total"] == told("total_draft_tokens") > 0
    blocks = answers[0]["total_draft_tokens"][0] // BLOCK + answers[1]["total_draft_tokens"][0] // 2
    assert blocks < grown["num_drafts_total"] <= blocks + answers[3]["num_rounds"][0]
    assert grown["num_verified_tokens_total"] == told("total_verified_draft_tokens")
    assert grown["num_accepted_tokens_total"] == told("total_accepted_draft_tokens") > 0
    for kind in ("verified", "accepted"):
        by_place = [grown[f"num_{kind}_tokens_per_pos_total{place}"] for place in range(BLOCK)]
        assert sum(by_place) == grown[f"num_{kind}_tokens_total"]
        assert by_place == sorted(by_place, reverse=True), "a place is reached only through those before it"
    assert grown["draft_seconds_total"] > 0
    assert grown["dspark_predicted_step_seconds_total"] > 0
    for name, most in (("trim_ratio", 1.0), ("verify_budget", 16.0 * BLOCK)):
        assert 0 <= after[f"dspark_spec_decode_{name}"] <= most
    assert after["dspark_cost_model_error"] > 0


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({"draft_policy": "clever"}, "draft_policy: expected off"),
        ({"draft_policy": "fixed:-1"}, "draft_policy: "),
        ({"max_draft_tokens": -1}, "max_draft_tokens: expected at least 0, got -1"),
    ],
)
def test_senseless_options_are_refused(client, inputs, wanted):
    assert wanted in refusal(client, {"input_ids": [1, 2, 3]} | inputs)
    assert client.generate(golden_request())["output_ids"] == golden_tokens()


def test_a_policy_without_a_drafter_is_refused(tiny_server):
    with RawClient(tiny_server.grpc_url) as client:
        for policy in ("causal", "lagged", "fixed:2", "threshold:0.5"):
            wanted = f"draft_policy: expected off, this server runs without a drafter, got '{policy}'"
            assert refusal(client, {"input_ids": [1, 2, 3], "draft_policy": policy}).endswith(wanted)
        for harmless in ({"draft_policy": "off"}, {"max_draft_tokens": 3}):
            answer = client.generate({"input_ids": [1, 2, 3], "max_tokens": 4} | harmless)
            assert (answer["num_output_tokens"], answer["total_draft_tokens"]) == ([4], [0])
