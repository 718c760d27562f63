"""What the engine hands out: pieces of text as they come, and a summary with the last of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """EOS or a stop string."""
    LENGTH = "length"
    """max_tokens or the end of the context."""


@dataclass(frozen=True)
class Usage:
    """Counts and times of one finished sequence. Times are nanoseconds since the epoch."""

    input_tokens: int
    output_tokens: int
    draft_tokens: int
    """Proposed by the drafter."""
    verified_draft_tokens: int
    """Checked by the target."""
    accepted_draft_tokens: int
    rounds: int
    """Verification steps of the target after prefill."""
    arrival_ns: int
    first_scheduled_ns: int
    first_token_ns: int
    last_token_ns: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted over verified draft tokens; 0 where nothing was verified."""
        return self.accepted_draft_tokens / self.verified_draft_tokens if self.verified_draft_tokens else 0.0


@dataclass(frozen=True)
class Delta:
    """The next piece of one sequence.

    The concatenation of ``text`` over a sequence's deltas is the whole answer. ``token_ids`` are the tokens accepted
    since the delta before; text may lag behind them while a character or a stop string is incomplete.
    """

    sequence_index: int
    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    """One a token where the request asked for them, else empty."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """Set exactly when ``finish_reason`` is."""
