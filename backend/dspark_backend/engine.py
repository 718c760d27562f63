"""The engine: continuous batching over the stages. Single-threaded; :mod:`dspark_backend.runner` gives it a thread."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_backend.admission import AdmissionQueue
from dspark_backend.config import EngineConfig
from dspark_backend.errors import DeadlineExceeded, DSparkError, InternalError, RequestCancelled
from dspark_backend.kv_cache import KvCache
from dspark_backend.metrics import EngineMetrics
from dspark_backend.rng import Purpose
from dspark_backend.sampling import draw, greedy_token, log_probability, needs_logits, target_distribution
from dspark_backend.scheduling import DraftRound, parse_policy
from dspark_backend.sequence import RequestState, SequenceState
from dspark_backend.stages.batch import FloatArray, Segment, StepBatch, StepOutput
from dspark_backend.stages.protocol import VerifierStage
from dspark_backend.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MIB = 2**20
_SEE_LOG = "internal error; the server's log has the details"


@dataclass(frozen=True)
class _Ran:
    """A step of the stage that went well."""

    batch: StepBatch
    output: StepOutput
    seconds: float


class Engine:
    """Admits requests to slots and moves all of them on, one step at a time.

    Raises:
        DSparkError: the settings do not fit the stage (a cache budget below one sequence).
    """

    def __init__(self, stage: VerifierStage, tokenizer: Tokenizer | None, config: EngineConfig) -> None:
        self._stage = stage
        self._tokenizer = tokenizer
        self._config = config
        self._policy = parse_policy(config.policy)
        self.metrics = EngineMetrics()
        self.cache = KvCache(stage, config.max_slots, config.kv_budget_mib * _MIB, config.max_context)
        self._requests: set[RequestState] = set()
        self._waiting = AdmissionQueue()
        self._prefilling: list[SequenceState] = []
        self._verifying: list[SequenceState] = []

    @property
    def idle(self) -> bool:
        return not self._requests

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    def submit(self, state: RequestState) -> None:
        """Queue a request. Its results come through its sink during later steps."""
        self._requests.add(state)
        try:
            for index in range(state.prepared.request.num_sequences):
                self._waiting.push(SequenceState(state, index, self._tokenizer))
        except Exception:  # a defect of ours must cost one request, not the engine
            logger.exception("a request could not be queued")
            self._fail(state, InternalError(_SEE_LOG))

    def step(self) -> None:
        """One round: every running sequence gets at least one token, and some prompts a chunk further."""
        self._drop_ended_requests()
        self._admit()
        self._prefill()
        self._verify(self._schedule())
        self._set_gauges()

    def fail_all(self, error: DSparkError) -> None:
        """End every request with an error."""
        for state in list(self._requests):
            self._fail(state, error)
        self._set_gauges()

    def recover(self) -> None:
        """After a step that raised: end every request, and start over with an empty cache."""
        try:
            self.fail_all(InternalError(_SEE_LOG))
        finally:
            self._prefilling.clear()
            self._verifying.clear()
            self.cache.reset()
            self._set_gauges()

    def _drop_ended_requests(self) -> None:
        now = time.time_ns()
        for state in list(self._requests):
            if state.cancelled:
                self._fail(state, RequestCancelled("the request was cancelled"))
            elif state.deadline_ns is not None and now > state.deadline_ns:
                timeout = state.prepared.request.timeout_ms
                self._fail(state, DeadlineExceeded(f"timeout_ms: the deadline of {timeout} ms passed"))

    def _admit(self) -> None:
        now = time.time_ns()
        while self._waiting and self.cache.fits(self._waiting.head().prepared.reserve):
            sequence = self._waiting.pop()
            sequence.slot = self.cache.acquire(sequence.prepared.reserve)
            sequence.first_scheduled_ns = now
            self._prefilling.append(sequence)
            self.metrics.prompt_tokens_total.add(len(sequence.prepared.prompt_ids))
            self.metrics.request_queue_time_seconds.observe((now - sequence.state.arrival_ns) / 1e9)

    def _prefill(self) -> None:
        """Put the next chunk of prompts into the cache; a prompt's last token gives the first one of the answer."""
        budget = self._config.prefill_chunk_busy if self._verifying else self._config.prefill_chunk
        chosen: list[SequenceState] = []
        segments: list[Segment] = []
        leading = {sequence.state for sequence in self._prefilling if sequence.index == 0}
        for sequence in self._prefilling:
            if budget <= 0:
                break
            if not sequence.prefill_started:
                if self._config.prefix_reuse and sequence.index > 0 and sequence.state in leading:
                    continue  # one step later the prompt's rows are there to be copied
                self._start_prefill(sequence)
            start, prompt = sequence.held_slot.length, sequence.prepared.prompt_ids
            piece = prompt[start : start + budget]
            wanted = 1 if start + len(piece) == len(prompt) else 0
            segments.append(Segment(sequence.held_slot.index, start, piece, len(piece) - wanted))
            chosen.append(sequence)
            budget -= len(piece)
        ran = self._run(chosen, segments)
        if ran is None:
            return
        self.metrics.prefill_seconds_total.add(ran.seconds)
        for row, (sequence, segment) in enumerate(zip(chosen, segments, strict=True)):
            if sequence.slot is None:
                continue  # another sequence of its request failed just now
            sequence.held_slot.commit(segment.token_ids)
            first = int(ran.batch.logit_offsets[row])
            if segment.logits_from < len(segment.token_ids):
                self._prefilling.remove(sequence)
                self._verifying.append(sequence)
                self._take_token(sequence, ran.output.logits[first], int(ran.output.argmax[first]))

    def _start_prefill(self, sequence: SequenceState) -> None:
        """Late, so that siblings of one request find the first one's rows in the cache."""
        sequence.prefill_started = True
        if not self._config.prefix_reuse:
            sequence.held_slot.truncate(0)
            return
        prompt = sequence.prepared.prompt_ids
        # The last token must run again: its logits are the answer's first.
        hit = self.cache.reuse_prefix(sequence.held_slot, prompt, len(prompt) - 1)
        self.metrics.prefix_cache_hit_tokens_total.add(hit)

    def _schedule(self) -> NDArray[np.int64]:
        """Verification depth of every running sequence, int64 [R]."""
        remaining = [sequence.prepared.max_tokens - sequence.context.output_length for sequence in self._verifying]
        limits = np.array(remaining, dtype=np.int64) - 1
        return self._policy.depths(
            DraftRound(
                survival=np.empty((len(limits), 0)),
                lagged_survival=np.empty((len(limits), 0)),
                limits=limits,
                seconds=np.ones(1),
                base_tokens=len(limits),
            )
        )

    def _verify(self, depths: NDArray[np.int64]) -> None:
        """Run the target over the anchors (and ``depths`` drafts each), and take what it says."""
        chosen = list(self._verifying)
        segments = [
            Segment(sequence.held_slot.index, sequence.held_slot.length, [sequence.anchor], 0) for sequence in chosen
        ]
        ran = self._run(chosen, segments)
        if ran is None:
            return
        self.metrics.steps_total.add()
        self.metrics.step_seconds_total.add(ran.seconds)
        self.metrics.step_tokens_total.add(ran.batch.num_tokens)
        for row, (sequence, segment) in enumerate(zip(chosen, segments, strict=True)):
            if sequence.slot is None:
                continue  # another sequence of its request failed just now
            sequence.held_slot.commit(segment.token_ids)
            sequence.rounds += 1
            first = int(ran.batch.logit_offsets[row])
            self._take_token(sequence, ran.output.logits[first], int(ran.output.argmax[first]))

    def _run(self, chosen: Sequence[SequenceState], segments: Sequence[Segment]) -> _Ran | None:
        """One step of the stage; None where there is nothing to run or it failed (its requests then failed, too)."""
        if not segments:
            return None
        self.cache.prepare(max(segment.start + len(segment.token_ids) for segment in segments))
        # prepare may have moved sequences to other slots.
        placed = [
            Segment(sequence.held_slot.index, segment.start, segment.token_ids, segment.logits_from)
            for sequence, segment in zip(chosen, segments, strict=True)
        ]
        batch = StepBatch.pack(placed)
        begin = time.perf_counter()
        try:
            output = self._stage.step(batch)
        except Exception as error:  # whatever the runtime raises must not end the engine
            logger.exception("a step of the verifier failed")
            for sequence in chosen:
                self._fail(sequence.state, InternalError(f"the model failed: {error}"))
            return None
        return _Ran(batch, output, time.perf_counter() - begin)

    def _take_token(self, sequence: SequenceState, logits: FloatArray, argmax: int) -> None:
        """Choose the next token from the target's logits [V], and hand on what came of it."""
        request, mask = sequence.prepared.request, sequence.prepared.mask
        params = request.sampling
        try:
            if not math.isfinite(logits.max()):
                # NaN anywhere shows in the maximum. Its rows must not be reused.
                self.cache.scrub(sequence.held_slot)
                raise InternalError("the model gave logits that are not finite; check the exported artifact")
            if not needs_logits(params, mask, sequence.context.output_length):
                token = argmax
            elif params.greedy:
                token = greedy_token(logits, params, sequence.context, mask)
            else:
                probabilities = target_distribution(logits, params, sequence.context, mask)
                token = draw(probabilities, sequence.rng.uniform(Purpose.TARGET))
            log_prob = float(log_probability(logits, token)) if request.log_probs else None
            sequence.append(token, log_prob)
        except DSparkError as error:
            self._fail(sequence.state, error)
            return
        except Exception:  # a defect of ours must cost one request, not the engine
            logger.exception("a request failed on an internal error")
            self._fail(sequence.state, InternalError(_SEE_LOG))
            return
        self._emit(sequence)

    def _emit(self, sequence: SequenceState) -> None:
        """Send what is new of a sequence; let go of it where it is finished."""
        state = sequence.state
        delta = sequence.take_delta()
        if delta is None:
            return
        self.metrics.generation_tokens_total.add(len(delta.token_ids))
        if sequence.context.output_length == len(delta.token_ids):
            self.metrics.time_to_first_token_seconds.observe((sequence.first_token_ns - state.arrival_ns) / 1e9)
        if delta.finish_reason is not None:
            self._retire(sequence)
            state.open -= 1
            if delta.usage is not None:
                self.metrics.count_finished(delta.finish_reason, delta.usage)
        last = state.open == 0
        if last:
            self._requests.discard(state)
        try:
            state.sink.delta(delta, last)
        except Exception:  # nobody listens any more: the others must go on
            logger.exception("a result could not be delivered")
            self._fail(state, InternalError(_SEE_LOG))

    def _retire(self, sequence: SequenceState) -> None:
        """Give back the slot of a sequence that runs no more."""
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        if sequence in self._verifying:
            self._verifying.remove(sequence)
        if sequence.slot is not None:
            self.cache.release(sequence.slot)
            sequence.slot = None

    def _fail(self, state: RequestState, error: DSparkError) -> None:
        """End a request with an error. Does nothing where it ended already."""
        if state not in self._requests:
            return
        self._requests.discard(state)
        self._waiting.remove(lambda sequence: sequence.state is state)
        for sequence in [*self._prefilling, *self._verifying]:
            if sequence.state is state:
                self._retire(sequence)
        self.metrics.count_failed(error.status, state.open)
        try:
            state.sink.error(error)
        except Exception:  # as above
            logger.exception("an error could not be delivered")

    def _set_gauges(self) -> None:
        metrics = self.metrics
        metrics.num_requests_running.value = len(self._prefilling) + len(self._verifying)
        metrics.num_requests_waiting.value = len(self._waiting)
        metrics.kv_cache_usage_bytes.value = self.cache.bytes_in_use
        metrics.kv_cache_capacity_rows.value = self.cache.capacity
        if self.idle:
            if self.cache.active:
                raise InternalError(f"cache: {len(self.cache.active)} slots are held while no request runs")
            self.cache.check_integrity()
