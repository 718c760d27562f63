"""What a client asks for, and the parameters of drawing tokens for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_backend.errors import InvalidRequest

MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 256
MAX_WORD_CHARS = 1024
MAX_SEQUENCES = 64
LEAST_TEMPERATURE = 1e-30
"""A little above the least normal float32: dividing by less overflows it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest(message)


def _check_words(name: str, words: Sequence[str], limit: int) -> None:
    _require(len(words) <= limit, f"{name}: expected at most {limit} entries, got {len(words)}")
    for word in words:
        _require(word != "", f"{name}: expected non-empty strings, got an empty one")
        _require(
            len(word) <= MAX_WORD_CHARS,
            f"{name}: expected entries of at most {MAX_WORD_CHARS} characters, got one of {len(word)}",
        )


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn from the target's logits. The defaults are greedy decoding.

    The transformations are applied in this order (the order of vLLM): bad words and ``min_tokens`` masks, repetition,
    presence and frequency penalties, temperature, min-p, top-k, top-p.

    Raises:
        InvalidRequest: a value lies outside its range; the message names the field, the range and the value.
    """

    temperature: float = 0.0
    """0 means greedy (argmax)."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output: positive logits are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output already holds."""
    frequency_penalty: float = 0.0
    """Subtracted once for each occurrence in the output."""
    seed: int | None = None
    """Makes a sampled answer reproducible whatever else runs; None draws one at random. Of no effect where the request
    itself asks for the policy causal or lagged."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(math.isfinite(value), f"{name}: expected a finite number, got {value}")
        _require(0.0 <= self.temperature <= 100.0, f"temperature: expected 0 (greedy) to 100, got {self.temperature}")
        _require(self.top_k >= -1, f"top_k: expected a count, or 0 or -1 for all tokens, got {self.top_k}")
        _require(0.0 < self.top_p <= 1.0, f"top_p: expected a number in (0, 1], got {self.top_p}")
        _require(0.0 <= self.min_p <= 1.0, f"min_p: expected a number in [0, 1], got {self.min_p}")
        _require(
            0.01 <= self.repetition_penalty <= 100.0,
            f"repetition_penalty: expected a number in [0.01, 100], got {self.repetition_penalty}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-100.0 <= value <= 100.0, f"{name}: expected a number in [-100, 100], got {value}")
        if self.seed is not None:
            _require(0 <= self.seed < 2**64, f"seed: expected an unsigned 64-bit integer, got {self.seed}")


@dataclass(frozen=True)
class GenerationRequest:
    """One call of a client: a prompt in exactly one of three forms, limits and options.

    Raises:
        InvalidRequest: a value lies outside its range, or not exactly one of text, input_ids and messages is given.
    """

    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    messages: str | None = None
    """JSON: a list of {"role": ..., "content": ...}, rendered with the model's chat template."""
    max_tokens: int | None = None
    """None takes the engine's ``default_max_tokens``; either is cut to what the context leaves."""
    min_tokens: int = 0
    """No EOS, stop string or stop before this many tokens."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_words: tuple[str, ...] = ()
    """The text ends before the first occurrence of any of these."""
    bad_words: tuple[str, ...] = ()
    """Never generated."""
    ignore_eos: bool = False
    log_probs: bool = False
    """Report the log-probability of every generated token under the target's unmodified distribution."""
    num_sequences: int = 1
    echo: bool = False
    """The text starts with the prompt."""
    stream: bool = True
    priority: int = 0
    """Higher is admitted first; equal priorities first come, first served."""
    timeout_ms: int | None = None
    """From arrival to the last token."""
    draft_policy: str | None = None
    """How deep drafts are verified: off, fixed:N, threshold:P, causal or lagged. None takes the engine's policy."""
    max_draft_tokens: int | None = None
    """Most drafts verified a round; 0 turns speculation off for this request."""

    def __post_init__(self) -> None:
        given = [name for name in ("text", "input_ids", "messages") if getattr(self, name) is not None]
        _require(
            len(given) == 1,
            "expected exactly one of text_input, input_ids and messages, got "
            + (" and ".join("text_input" if name == "text" else name for name in given) or "none"),
        )
        if self.input_ids is not None:
            _require(len(self.input_ids) >= 1, "input_ids: expected at least one token, got none")
            _require(min(self.input_ids) >= 0, f"input_ids: expected token ids from 0, got {min(self.input_ids)}")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, f"max_tokens: expected at least 1, got {self.max_tokens}")
        _require(self.min_tokens >= 0, f"min_tokens: expected at least 0, got {self.min_tokens}")
        if self.max_tokens is not None:
            _require(
                self.min_tokens <= self.max_tokens,
                f"min_tokens: expected at most max_tokens ({self.max_tokens}), got {self.min_tokens}",
            )
        _require(
            1 <= self.num_sequences <= MAX_SEQUENCES,
            f"num_return_sequences: expected 1 to {MAX_SEQUENCES}, got {self.num_sequences}",
        )
        if self.timeout_ms is not None:
            _require(self.timeout_ms >= 1, f"timeout_ms: expected at least 1, got {self.timeout_ms}")
        if self.max_draft_tokens is not None:
            _require(self.max_draft_tokens >= 0, f"max_draft_tokens: expected at least 0, got {self.max_draft_tokens}")
        _check_words("stop_words", self.stop_words, MAX_STOP_STRINGS)
        _check_words("bad_words", self.bad_words, MAX_BAD_WORDS)
