"""Counters, gauges and histograms of the engine: plain numbers, written by the engine's thread, read by a publisher.

Names keep vLLM's suffixes under the prefix ``dspark_``, so that dashboards carry over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import InitVar, dataclass, field, fields
from typing import ClassVar

from dspark_backend.delta import FinishReason, Usage
from dspark_backend.errors import Status

PREFIX = "dspark_"

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


@dataclass
class Counter:
    """Only grows."""

    doc: str
    labels: tuple[tuple[str, str], ...] = ()
    value: float = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount


@dataclass
class Gauge:
    """A level."""

    doc: str
    labels: tuple[tuple[str, str], ...] = ()
    value: float = 0.0


@dataclass
class Histogram:
    """Observations that wait for the publisher. ``deque`` makes append and popleft safe between two threads."""

    doc: str
    buckets: tuple[float, ...]
    labels: tuple[tuple[str, str], ...] = ()
    pending: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))

    def observe(self, value: float) -> None:
        self.pending.append(value)


def _finished(reason: str) -> Counter:
    return Counter("Sequences that ended, by how they ended.", (("reason", reason),))


@dataclass
class EngineMetrics:
    """Every metric, one a field. A field named ``x__label`` is the metric ``x`` under one of its labels."""

    SEPARATOR: ClassVar[str] = "__"

    block_size: InitVar[int] = 0
    """Of the drafter; 0 without one."""

    prompt_tokens_total: Counter = field(default_factory=lambda: Counter("Prompt tokens of admitted requests."))
    generation_tokens_total: Counter = field(default_factory=lambda: Counter("Tokens handed to clients."))
    prefix_cache_hit_tokens_total: Counter = field(
        default_factory=lambda: Counter("Prompt tokens whose rows were cached already.")
    )
    steps_total: Counter = field(default_factory=lambda: Counter("Verification steps of the target, without prefill."))
    step_seconds_total: Counter = field(default_factory=lambda: Counter("Time in verification steps."))
    step_tokens_total: Counter = field(default_factory=lambda: Counter("Tokens in verification steps."))
    prefill_seconds_total: Counter = field(default_factory=lambda: Counter("Time in prefill steps."))
    spec_decode_num_drafts_total: Counter = field(default_factory=lambda: Counter("Drafted blocks."))
    spec_decode_num_draft_tokens_total: Counter = field(default_factory=lambda: Counter("Drafted tokens."))
    spec_decode_num_verified_tokens_total: Counter = field(
        default_factory=lambda: Counter("Drafted tokens that the scheduler sent to verification.")
    )
    spec_decode_num_accepted_tokens_total: Counter = field(default_factory=lambda: Counter("Accepted draft tokens."))
    spec_decode_num_accepted_tokens_per_pos_total: list[Counter] = field(init=False)
    """One a place in the block."""
    spec_decode_num_verified_tokens_per_pos_total: list[Counter] = field(init=False)
    spec_decode_drafter_skips_total: Counter = field(
        default_factory=lambda: Counter("Rounds of a sequence in which drafting was not expected to pay.")
    )
    spec_decode_draft_seconds_total: Counter = field(default_factory=lambda: Counter("Time in the drafter."))
    spec_decode_verify_budget: Gauge = field(
        default_factory=lambda: Gauge("Drafts that the last step verified, over all sequences.")
    )
    spec_decode_trim_ratio: Gauge = field(
        default_factory=lambda: Gauge("Share of the drafts of the last step that the scheduler left out.")
    )
    spec_decode_calibration_error: Gauge = field(
        default_factory=lambda: Gauge("Running difference of predicted and observed acceptance.")
    )
    predicted_step_seconds_total: Counter = field(
        default_factory=lambda: Counter("Time that the cost model predicted for the verification steps.")
    )
    cost_model_error: Gauge = field(
        default_factory=lambda: Gauge("Running mean of |predicted / actual - 1| of verification steps.")
    )
    requests_finished_total__stop: Counter = field(default_factory=lambda: _finished("stop"))
    requests_finished_total__length: Counter = field(default_factory=lambda: _finished("length"))
    requests_finished_total__cancelled: Counter = field(default_factory=lambda: _finished("cancelled"))
    requests_finished_total__deadline: Counter = field(default_factory=lambda: _finished("deadline"))
    requests_finished_total__rejected: Counter = field(default_factory=lambda: _finished("rejected"))
    requests_finished_total__invalid: Counter = field(default_factory=lambda: _finished("invalid"))
    requests_finished_total__error: Counter = field(default_factory=lambda: _finished("error"))
    num_requests_running: Gauge = field(default_factory=lambda: Gauge("Sequences that hold a slot."))
    num_requests_waiting: Gauge = field(default_factory=lambda: Gauge("Sequences that wait for a slot."))
    kv_cache_usage_bytes: Gauge = field(default_factory=lambda: Gauge("Bytes of committed rows of running sequences."))
    kv_cache_capacity_rows: Gauge = field(default_factory=lambda: Gauge("Rows of each slot at present."))
    time_to_first_token_seconds: Histogram = field(
        default_factory=lambda: Histogram("From arrival to the first token.", _LATENCY_BUCKETS)
    )
    time_per_output_token_seconds: Histogram = field(
        default_factory=lambda: Histogram("Mean time between tokens of a finished sequence.", _TOKEN_BUCKETS)
    )
    e2e_request_latency_seconds: Histogram = field(
        default_factory=lambda: Histogram("From arrival to the last token.", _LATENCY_BUCKETS)
    )
    request_queue_time_seconds: Histogram = field(
        default_factory=lambda: Histogram("From arrival to the first slot.", _LATENCY_BUCKETS)
    )

    def __post_init__(self, block_size: int) -> None:
        def by_place(doc: str) -> list[Counter]:
            return [Counter(doc, (("position", str(place)),)) for place in range(block_size)]

        self.spec_decode_num_accepted_tokens_per_pos_total = by_place("Accepted draft tokens by place in the block.")
        self.spec_decode_num_verified_tokens_per_pos_total = by_place("Verified draft tokens by place in the block.")

    def count_step(self, tokens: int, seconds: float) -> None:
        """A verification step ended."""
        self.steps_total.add()
        self.step_seconds_total.add(seconds)
        self.step_tokens_total.add(tokens)

    def count_block(self, drafted: int, verified: int, accepted: int) -> None:
        """A block was drafted for a sequence, and so much of it verified and accepted."""
        self.spec_decode_num_drafts_total.add()
        self.spec_decode_num_draft_tokens_total.add(drafted)
        self.spec_decode_num_verified_tokens_total.add(verified)
        self.spec_decode_num_accepted_tokens_total.add(accepted)
        for place in range(verified):
            self.spec_decode_num_verified_tokens_per_pos_total[place].add()
        for place in range(accepted):
            self.spec_decode_num_accepted_tokens_per_pos_total[place].add()

    def count_finished(self, reason: FinishReason, usage: Usage) -> None:
        """A sequence reached its end."""
        stopped = reason is FinishReason.STOP
        (self.requests_finished_total__stop if stopped else self.requests_finished_total__length).add()
        self.e2e_request_latency_seconds.observe((usage.last_token_ns - usage.arrival_ns) / 1e9)
        if usage.output_tokens > 1:
            span = usage.last_token_ns - usage.first_token_ns
            self.time_per_output_token_seconds.observe(span / (usage.output_tokens - 1) / 1e9)

    def count_failed(self, status: Status, sequences: int) -> None:
        """So many sequences ended with an error."""
        counters = {
            Status.CANCELLED: self.requests_finished_total__cancelled,
            Status.DEADLINE_EXCEEDED: self.requests_finished_total__deadline,
            Status.UNAVAILABLE: self.requests_finished_total__rejected,
        }
        counters.get(status, self.requests_finished_total__error).add(sequences)

    def items(self) -> list[tuple[str, Counter | Gauge | Histogram]]:
        """(exported name, metric) of every field."""
        found: list[tuple[str, Counter | Gauge | Histogram]] = []
        for item in fields(self):
            value = getattr(self, item.name)
            name = PREFIX + item.name.split(self.SEPARATOR)[0]
            found += [(name, metric) for metric in (value if isinstance(value, list) else [value])]
        return found
