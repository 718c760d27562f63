"""One answer in the making, and the request it belongs to."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Protocol

from dspark_backend.delta import Delta, FinishReason, Usage
from dspark_backend.detokenizer import IncrementalDetokenizer
from dspark_backend.draft_state import DraftState
from dspark_backend.errors import DSparkError, InternalError
from dspark_backend.kv_cache import Slot
from dspark_backend.penalties import SamplingContext
from dspark_backend.preparation import PreparedRequest
from dspark_backend.rng import RngStreams
from dspark_backend.stop_strings import StopStrings
from dspark_backend.tokenizer import Tokenizer

_NUMBERS = itertools.count()


class Sink(Protocol):
    """Where a request's results go. Called by the engine's thread, which must not be held up."""

    def delta(self, delta: Delta, last: bool) -> None:
        """The next piece; ``last`` with the final one of the whole request."""

    def error(self, error: DSparkError) -> None:
        """The request failed; nothing follows."""


@dataclass(eq=False)
class RequestState:
    """A request in the engine."""

    prepared: PreparedRequest
    sink: Sink
    arrival_ns: int
    cancelled: bool = False
    """Set by any thread; the engine looks at the start of each step."""
    open: int = 0
    """Sequences not yet finished."""

    def __post_init__(self) -> None:
        self.open = self.prepared.request.num_sequences

    @property
    def deadline_ns(self) -> int | None:
        timeout = self.prepared.request.timeout_ms
        return None if timeout is None else self.arrival_ns + timeout * 1_000_000


@dataclass
class _Pending:
    """Results since the last delta."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class SequenceState:
    """One sequence: its tokens, its slot, its text so far. Knows when it ends; does not know about batches."""

    def __init__(self, state: RequestState, index: int, tokenizer: Tokenizer | None) -> None:
        request, prompt = state.prepared.request, state.prepared.prompt_ids
        self.state = state
        self.index = index
        self.number = next(_NUMBERS)
        """Tells it from all other sequences of this process."""
        self.slot: Slot | None = None
        self.prefill_started = False
        self.reused_rows = 0
        """Of its slot, that earlier sequences computed."""
        self.context = SamplingContext(prompt)
        # Depths that weigh requests against each other must know nothing of what these numbers will decide. Requests
        # with one seed, together or one after another, would tell: under an adaptive policy it has no effect.
        self.rng = RngStreams(None if state.prepared.policy.adaptive else request.sampling.seed, index)
        self.finish_reason: FinishReason | None = None
        self.draft = DraftState()
        self.rounds = 0
        self.first_scheduled_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0
        self._stops = StopStrings(request.stop_words)
        self._pending = _Pending()
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(tokenizer)
            self._detokenizer.prime(prompt)
        if request.echo:
            self._pending.text.append(state.prepared.prompt_text)

    @property
    def prepared(self) -> PreparedRequest:
        return self.state.prepared

    @property
    def held_slot(self) -> Slot:
        """The slot of a sequence that was admitted. Raises DSparkError for one that waits or is gone."""
        if self.slot is None:
            raise InternalError("a sequence without a slot was scheduled")
        return self.slot

    @property
    def anchor(self) -> int:
        """The last token the target produced, not yet in the cache."""
        return self.context.output_ids[-1]

    def append(self, token: int, log_prob: float | None) -> None:
        """Take the target's next token, and finish where it ends the sequence."""
        request = self.prepared.request
        self.context.append(token)
        self.last_token_ns = time.time_ns()
        if not self.first_token_ns:
            self.first_token_ns = self.last_token_ns
        self._pending.token_ids.append(token)
        if log_prob is not None:
            self._pending.log_probs.append(log_prob)
        ended = token in self.prepared.mask.end_ids and not request.ignore_eos
        if not ended and self._take_text(self._detokenizer.push([token]) if self._detokenizer else ""):
            return
        if ended or self.context.output_length == self.prepared.max_tokens:
            self._finish_text()
            self.finish_reason = self.finish_reason or (FinishReason.STOP if ended else FinishReason.LENGTH)

    def _take_text(self, text: str) -> bool:
        """Pass text through the stop strings; True where one of them ended the sequence."""
        armed = self.context.output_length >= self.prepared.request.min_tokens
        fed = self._stops.feed(text, armed)
        self._pending.text.append(fed.text)
        if fed.stopped:
            self.finish_reason = FinishReason.STOP
        return fed.stopped

    def _finish_text(self) -> None:
        if self._detokenizer is not None and self._take_text(self._detokenizer.finish()):
            return
        self._pending.text.append(self._stops.flush())

    def take_delta(self) -> Delta | None:
        """What came since the last call; None while there is nothing to tell or the client wants it all at once."""
        finished = self.finish_reason is not None
        pending = self._pending
        if not finished and not (self.prepared.request.stream and pending.token_ids):
            return None
        self._pending = _Pending()
        return Delta(
            sequence_index=self.index,
            text="".join(pending.text),
            token_ids=tuple(pending.token_ids),
            log_probs=tuple(pending.log_probs),
            finish_reason=self.finish_reason,
            usage=self._usage() if finished else None,
        )

    def _usage(self) -> Usage:
        return Usage(
            input_tokens=len(self.prepared.prompt_ids),
            output_tokens=self.context.output_length,
            draft_tokens=self.draft.drafted_tokens,
            verified_draft_tokens=self.draft.verified_tokens,
            accepted_draft_tokens=self.draft.accepted_tokens,
            rounds=self.rounds,
            arrival_ns=self.state.arrival_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
        )
