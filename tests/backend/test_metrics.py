"""Names and kinds of the engine's metrics."""

from __future__ import annotations

import re

import pytest

from dspark_backend.delta import FinishReason, Usage
from dspark_backend.errors import Status
from dspark_backend.metrics import Counter, EngineMetrics, Gauge, Histogram

KEPT_FROM_VLLM = {
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "num_requests_running",
    "num_requests_waiting",
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "prompt_tokens_total",
    "generation_tokens_total",
}


@pytest.fixture
def metrics() -> EngineMetrics:
    return EngineMetrics()


def usage(output_tokens: int) -> Usage:
    return Usage(
        input_tokens=3,
        output_tokens=output_tokens,
        draft_tokens=0,
        verified_draft_tokens=0,
        accepted_draft_tokens=0,
        rounds=output_tokens - 1,
        arrival_ns=1_000_000_000,
        first_scheduled_ns=1_100_000_000,
        first_token_ns=1_500_000_000,
        last_token_ns=3_500_000_000,
    )


def test_names(metrics):
    names = {name for name, _ in metrics.items()}
    assert {f"dspark_{name}" for name in KEPT_FROM_VLLM} <= names
    for name, metric in metrics.items():
        assert re.fullmatch(r"dspark_[a-z0-9_]+", name) and "__" not in name
        assert metric.doc.endswith(".")
        assert name.endswith("_total") == isinstance(metric, Counter), name


def test_a_name_and_its_labels_are_unique(metrics):
    keys = [(name, metric.labels) for name, metric in metrics.items()]
    assert len(set(keys)) == len(keys)
    kinds: dict[str, type] = {}
    for name, metric in metrics.items():
        assert kinds.setdefault(name, type(metric)) is type(metric)
    reasons = [dict(labels)["reason"] for name, labels in keys if name == "dspark_requests_finished_total"]
    assert sorted(reasons) == ["cancelled", "deadline", "error", "invalid", "length", "rejected", "stop"]


def test_buckets_ascend(metrics):
    histograms = [metric for _, metric in metrics.items() if isinstance(metric, Histogram)]
    assert histograms
    for histogram in histograms:
        assert list(histogram.buckets) == sorted(set(histogram.buckets))


def test_nothing_is_shared_between_engines(metrics):
    other = EngineMetrics()
    metrics.steps_total.add(3)
    metrics.num_requests_running.value = 2
    metrics.time_to_first_token_seconds.observe(1.0)
    assert other.steps_total.value == 0 and not other.time_to_first_token_seconds.pending
    assert all(metric.value == 0 for _, metric in other.items() if isinstance(metric, Counter | Gauge))


def test_finished(metrics):
    metrics.count_finished(FinishReason.STOP, usage(5))
    metrics.count_finished(FinishReason.LENGTH, usage(1))
    assert metrics.requests_finished_total__stop.value == metrics.requests_finished_total__length.value == 1
    assert list(metrics.e2e_request_latency_seconds.pending) == [2.5, 2.5]
    assert list(metrics.time_per_output_token_seconds.pending) == [0.5]


@pytest.mark.parametrize(
    ("status", "field"),
    [
        (Status.CANCELLED, "cancelled"),
        (Status.DEADLINE_EXCEEDED, "deadline"),
        (Status.UNAVAILABLE, "rejected"),
        (Status.INTERNAL, "error"),
        (Status.INVALID_ARGUMENT, "error"),
    ],
)
def test_failed(metrics, status, field):
    metrics.count_failed(status, 3)
    assert getattr(metrics, f"requests_finished_total__{field}").value == 3


def test_observations_are_bounded(metrics):
    for _ in range(100_500):
        metrics.time_to_first_token_seconds.observe(1.0)
    assert len(metrics.time_to_first_token_seconds.pending) == 100_000
