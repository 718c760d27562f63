"""What to generate, as the caller writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn of a chat. ``role`` is what the model's chat template knows: system, user, assistant, ..."""

    role: str
    content: str


@dataclass(frozen=True)
class GenerateOptions:
    """Options of one request, named as the tensors of ``dspark_client.schema``. None is not sent: the server decides.

    What can be written as a tensor is sent; whether a value makes sense is the server's to say.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    """No EOS, stop string or stop before this many tokens."""
    temperature: float | None = None
    """0, the server's default, is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop_words: Sequence[str] | None = None
    """The text ends before the first of these."""
    bad_words: Sequence[str] | None = None
    """Never generated."""
    ignore_eos: bool | None = None
    return_log_probs: bool | None = None
    num_return_sequences: int | None = None
    exclude_input_in_output: bool | None = None
    """False puts the prompt before the answer."""
    priority: int | None = None
    """Higher is admitted first."""
    timeout_ms: int | None = None
    """The server's deadline. A client's ``timeout`` sets it too, so this is for a server limit of its own."""
    draft_policy: str | None = None
    """How deep drafts are verified: off, fixed:N, threshold:P, causal or lagged. No policy changes what is generated
    greedily, or its distribution when sampling."""
    max_draft_tokens: int | None = None
    """Most drafts verified a round."""
