"""What the Prometheus endpoint says after traffic."""

from __future__ import annotations

import time
import urllib.request

import numpy as np
import pytest
from raw_calls import RawClient, Refused
from server_state import PUBLISHED_SECS, metric, read_metrics, until, wait_idle

from dspark_backend.metrics import Counter, EngineMetrics, Gauge, Histogram

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def quiet(make_server):
    """A server that nobody else uses, after the launcher's own request."""
    made = make_server("tiny", parameters={"metrics_interval_ms": "100", "max_slots": "2", "max_queue_size": "4"})
    yield made
    made.stop()


def types_of(server) -> dict[str, str]:
    """Prometheus type of every family."""
    with urllib.request.urlopen(server.metrics_url) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.split()[2:4] for line in lines if line.startswith("# TYPE dspark_"))


def test_every_metric_of_the_engine_is_there_under_its_name_and_type(quiet):
    wait_idle(quiet)
    kinds = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}
    expected = {name: kinds[type(item)] for name, item in EngineMetrics().items()}
    assert types_of(quiet) == expected
    samples = {(sample.name, sample.labels) for sample in read_metrics(quiet)}
    own = (("model", "dspark"), ("version", "1"))
    for name, item in EngineMetrics().items():
        full = f"{name}_count" if isinstance(item, Histogram) else name
        labels = tuple(sorted((*own, *item.labels)))
        assert (full, labels) in {(sample, tuple(sorted(pairs))) for sample, pairs in samples}, name


def test_traffic_is_counted(quiet):
    wait_idle(quiet)
    names = ("prompt_tokens_total", "generation_tokens_total", "steps_total", "step_tokens_total")
    histograms = ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds")

    def read() -> dict[str, float]:
        counted = {name: metric(quiet, name) for name in names}
        counted |= {f"{name}_count": metric(quiet, f"{name}_count") for name in histograms}
        counted |= {f"{name}_sum": metric(quiet, f"{name}_sum") for name in histograms}
        counted["length"] = metric(quiet, "requests_finished_total", reason="length")
        return counted | {"seconds": metric(quiet, "step_seconds_total")}

    before = read()
    elapsed = 0.0
    with RawClient(quiet.grpc_url) as client:
        for _ in range(10):
            answer = client.generate({"input_ids": PROMPT, "max_tokens": 9})
            elapsed += (answer["last_token_time_ns"][0] - answer["arrival_time_ns"][0]) / 1e9
    wait_idle(quiet)
    grown = {name: value - before[name] for name, value in read().items()}
    assert grown["prompt_tokens_total"] == 50
    assert grown["generation_tokens_total"] == 90
    assert grown["steps_total"] == grown["step_tokens_total"] == 80  # the first token of each comes from prefill
    assert grown["length"] == 10
    assert [grown[f"{name}_count"] for name in histograms] == [10, 10, 10]
    assert grown["e2e_request_latency_seconds_sum"] == pytest.approx(elapsed, rel=0.05)
    assert 0 < grown["request_queue_time_seconds_sum"] < grown["time_to_first_token_seconds_sum"] < elapsed
    assert 0 < grown["seconds"] < elapsed


def test_endings_are_counted_by_reason(quiet):
    wait_idle(quiet)

    def ended(reason: str) -> float:
        return metric(quiet, "requests_finished_total", reason=reason)

    before = {reason: ended(reason) for reason in ("cancelled", "deadline", "rejected", "error")}
    long = {"input_ids": PROMPT, "max_tokens": 500, "stream": True}
    with RawClient(quiet.grpc_url) as client:
        with pytest.raises(Refused, match="DEADLINE_EXCEEDED"):
            list(client.stream(long | {"timeout_ms": 30}))
        call = client.open_stream(long)
        next(call)
        call.cancel()
        until(lambda: ended("cancelled") == before["cancelled"] + 1, 10, "a cancellation")
        # Two run, four wait, and no other may.
        calls = [client.open_stream(long) for _ in range(9)]
        refused = [message for call in calls for response in call if (message := response.error_message)]
    wait_idle(quiet)
    rejected = sum(message.startswith("[UNAVAILABLE]") for message in refused)
    assert rejected == len(refused) >= 1
    assert ended("rejected") - before["rejected"] == rejected
    assert ended("deadline") - before["deadline"] == 1
    assert ended("error") == before["error"] == 0


def test_gauges_follow_the_load(quiet):
    wait_idle(quiet)
    with RawClient(quiet.grpc_url) as client:
        seen: dict[str, float] = {}
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_bytes", "kv_cache_capacity_rows")
        for _ in range(3):
            calls = [client.open_stream({"input_ids": PROMPT, "max_tokens": 500}) for _ in range(5)]
            for _ in range(6):
                time.sleep(0.05)
                seen = {name: max(seen.get(name, 0.0), metric(quiet, name)) for name in gauges}
            for call in calls:
                list(call)
    assert seen["num_requests_running"] == 2
    assert 1 <= seen["num_requests_waiting"] <= 3
    row_bytes = 2 * 6 * 2 * 32 * 4
    assert 0 < seen["kv_cache_usage_bytes"] <= 2 * 505 * row_bytes
    assert seen["kv_cache_usage_bytes"] % row_bytes == 0
    assert 128 <= seen["kv_cache_capacity_rows"] <= 512
    wait_idle(quiet)


def test_a_cached_beginning_is_counted(quiet):
    wait_idle(quiet)
    prompt = np.random.default_rng(1).integers(0, 384, 100).astype(np.int32)
    before = metric(quiet, "prefix_cache_hit_tokens_total")
    with RawClient(quiet.grpc_url) as client:
        for _ in range(2):
            client.generate({"input_ids": prompt, "max_tokens": 1})
    until(
        lambda: metric(quiet, "prefix_cache_hit_tokens_total") == before + 99, 5 + PUBLISHED_SECS, "99 rows found again"
    )
