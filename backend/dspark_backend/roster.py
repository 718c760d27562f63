"""Who is in the engine: requests and their sequences, from the queue to the last word. Knows no model."""

from __future__ import annotations

import logging
import time

from dspark_backend.admission import AdmissionQueue
from dspark_backend.errors import DeadlineExceeded, DSparkError, InternalError, RequestCancelled
from dspark_backend.kv_cache import KvCache
from dspark_backend.metrics import EngineMetrics
from dspark_backend.sequence import RequestState, SequenceState
from dspark_backend.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SEE_LOG = "internal error; the server's log has the details"


class Roster:
    """Every sequence is in one of three places: waiting, prefilling or verifying. The last two hold a slot."""

    def __init__(self, cache: KvCache, tokenizer: Tokenizer | None, metrics: EngineMetrics) -> None:
        self._cache = cache
        self._tokenizer = tokenizer
        self._metrics = metrics
        self.requests: set[RequestState] = set()
        self.waiting = AdmissionQueue()
        self.prefilling: list[SequenceState] = []
        self.verifying: list[SequenceState] = []

    def join(self, state: RequestState) -> None:
        """Queue every sequence of a request."""
        self.requests.add(state)
        try:
            for index in range(state.prepared.request.num_sequences):
                self.waiting.push(SequenceState(state, index, self._tokenizer))
        except Exception:  # a defect of ours must cost one request, not the engine
            logger.exception("a request could not be queued")
            self.fail(state, InternalError(SEE_LOG))

    def admit(self) -> None:
        """Give slots to those that wait, as far as the cache has room."""
        now = time.time_ns()
        while self.waiting and self._cache.fits(self.waiting.head().prepared.reserve):
            sequence = self.waiting.pop()
            sequence.slot = self._cache.acquire(sequence.prepared.reserve, sequence.prepared.prompt_ids)
            sequence.first_scheduled_ns = now
            self.prefilling.append(sequence)
            self._metrics.prompt_tokens_total.add(len(sequence.prepared.prompt_ids))
            self._metrics.request_queue_time_seconds.observe((now - sequence.state.arrival_ns) / 1e9)

    def promote(self, sequence: SequenceState) -> None:
        """Its prompt is in the cache."""
        self.prefilling.remove(sequence)
        self.verifying.append(sequence)

    def drop_ended(self) -> None:
        """Fail requests that were cancelled or are past their deadline."""
        now = time.time_ns()
        for state in list(self.requests):
            if state.cancelled:
                self.fail(state, RequestCancelled("the request was cancelled"))
            elif state.deadline_ns is not None and now > state.deadline_ns:
                timeout = state.prepared.request.timeout_ms
                self.fail(state, DeadlineExceeded(f"timeout_ms: the deadline of {timeout} ms passed"))

    def emit(self, sequence: SequenceState) -> None:
        """Send what is new of a sequence; let go of it where it is finished."""
        state = sequence.state
        delta = sequence.take_delta()
        if delta is None:
            return
        self._metrics.generation_tokens_total.add(len(delta.token_ids))
        if sequence.context.output_length == len(delta.token_ids):
            self._metrics.time_to_first_token_seconds.observe((sequence.first_token_ns - state.arrival_ns) / 1e9)
        if delta.finish_reason is not None:
            self._retire(sequence)
            state.open -= 1
            if delta.usage is not None:
                self._metrics.count_finished(delta.finish_reason, delta.usage)
        last = state.open == 0
        if last:
            self.requests.discard(state)
        try:
            state.sink.delta(delta, last)
        except Exception:  # nobody listens any more: the others must go on
            logger.exception("a result could not be delivered")
            self.fail(state, InternalError(SEE_LOG))

    def fail(self, state: RequestState, error: DSparkError) -> None:
        """End a request with an error. Does nothing where it ended already."""
        if state not in self.requests:
            return
        self.requests.discard(state)
        self.waiting.remove(lambda sequence: sequence.state is state)
        for sequence in [*self.prefilling, *self.verifying]:
            if sequence.state is state:
                self._retire(sequence)
        self._metrics.count_failed(error.status, state.open)
        try:
            state.sink.error(error)
        except Exception:  # as above
            logger.exception("an error could not be delivered")

    def fail_all(self, error: DSparkError) -> None:
        """End every request with an error."""
        for state in list(self.requests):
            self.fail(state, error)

    def _retire(self, sequence: SequenceState) -> None:
        """Give back the slot of a sequence that runs no more."""
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
            if sequence.prefill_started and sequence.slot is not None:
                # No logits said that these rows are finite, and NaN would reach the slot's next owner through the mask.
                self._cache.scrub(sequence.slot, sequence.reused_rows)
        if sequence in self.verifying:
            self.verifying.remove(sequence)
        if sequence.slot is not None:
            self._cache.release(sequence.slot)
            sequence.slot = None

    def publish(self) -> None:
        """Bring the gauges up to date; when nobody is there, check that nothing is held.

        Raises:
            InternalError: a slot is held although no request runs.
        """
        metrics = self._metrics
        metrics.num_requests_running.value = len(self.prefilling) + len(self.verifying)
        metrics.num_requests_waiting.value = len(self.waiting)
        metrics.kv_cache_usage_bytes.value = self._cache.bytes_in_use
        metrics.kv_cache_capacity_rows.value = self._cache.capacity
        if not self.requests:
            if self._cache.active:
                raise InternalError(f"cache: {len(self._cache.active)} slots are held while no request runs")
            self._cache.check_integrity()
