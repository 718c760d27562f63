"""From what a client sent to what the engine runs: tokens, limits and masks, checked before a request may queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_backend.bad_words import BadWords, TokenMask
from dspark_backend.chat import ChatTemplate
from dspark_backend.errors import InvalidRequest
from dspark_backend.request import GenerationRequest
from dspark_backend.scheduling import DepthPolicy, Off, Threshold, parse_policy
from dspark_backend.stages.artifact import VerifierArtifact
from dspark_backend.tokenizer import Tokenizer

_BYTES_PER_TOKEN = 16
"""Text longer than this for each token of the context cannot fit, and is refused before it costs time."""


SEEDED = Threshold(0.4)
"""Verification depth of seeded sampled requests under an adaptive engine."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request that can be run."""

    request: GenerationRequest
    prompt_ids: tuple[int, ...]
    prompt_text: str
    """For echo; empty where nobody asked."""
    max_tokens: int
    mask: TokenMask
    policy: DepthPolicy = field(default_factory=Off)
    """How deep its drafts are verified."""

    @property
    def reserve(self) -> int:
        """Cache rows that a sequence can come to need: every token but the last one generated."""
        return len(self.prompt_ids) + self.max_tokens - 1


class Preparer:
    """Turns requests into prepared ones. Stateless, and safe to use from several threads at once."""

    def __init__(
        self,
        artifact: VerifierArtifact,
        tokenizer: Tokenizer | None,
        max_context: int,
        max_sequences: int,
        default_max_tokens: int,
        max_prompt_bytes: int = 0,
        default_policy: DepthPolicy | None = None,
    ) -> None:
        self._artifact = artifact
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(artifact.chat_template, artifact.bos_token, artifact.eos_token)
        self._max_context = max_context
        self._max_sequences = max_sequences
        self._default_max_tokens = default_max_tokens
        self._default_policy = default_policy
        self._max_prompt_bytes = max_prompt_bytes or _BYTES_PER_TOKEN * max_context

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Check and tokenise.

        Raises:
            InvalidRequest: the prompt is empty, malformed, too long or outside the vocabulary, or an option needs a
                tokenizer that this model has not.
        """
        if request.num_sequences > self._max_sequences:
            raise InvalidRequest(
                f"num_return_sequences: expected at most {self._max_sequences} (the engine's max_slots), "
                f"got {request.num_sequences}"
            )
        prompt_ids, prompt_text = self._prompt(request)
        if not prompt_ids:
            raise InvalidRequest("prompt: expected at least one token, got an empty prompt")
        # Also what our tokenizer made: it may know tokens that the model does not, and a step would fail for all.
        self._check_ids("input_ids" if request.input_ids is not None else "prompt", prompt_ids)
        room = self._max_context - len(prompt_ids)
        if room < 1:
            raise InvalidRequest(
                f"prompt: expected at most {self._max_context - 1} tokens (the context holds {self._max_context}, one "
                f"is for the answer), got {len(prompt_ids)}; shorten the prompt"
            )
        max_tokens = min(request.max_tokens or max(self._default_max_tokens, request.min_tokens), room)
        if request.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens: expected at most {max_tokens}, what the context of {self._max_context} leaves after a "
                f"prompt of {len(prompt_ids)} tokens, got {request.min_tokens}"
            )
        if request.stop_words and self._tokenizer is None:
            raise InvalidRequest("stop_words: expected none, this model was exported without a tokenizer")
        mask = TokenMask(
            bad_words=self._bad_words(request.bad_words),
            min_tokens=request.min_tokens,
            end_ids=tuple(token for token in self._artifact.eos_token_ids if token < self._artifact.vocab_size),
        )
        return PreparedRequest(
            request=request,
            prompt_ids=tuple(prompt_ids),
            prompt_text=prompt_text if request.echo else "",
            max_tokens=max_tokens,
            mask=mask,
            policy=self._policy(request),
        )

    def _policy(self, request: GenerationRequest) -> DepthPolicy:
        """The request's own policy or the engine's; without a drafter there is only ``off``.

        A sampled request with a seed that names no policy gets SEEDED instead of an adaptive one: its depths depend on
        its own drafts alone, so that the seed decides the tokens whatever else runs.
        """
        wanted = request.draft_policy
        try:
            policy = self._default_policy if wanted is None else parse_policy(wanted)
        except ValueError as error:
            raise InvalidRequest(f"draft_policy: {error}") from None
        if self._default_policy is None:
            if policy is not None and policy.drafts:
                raise InvalidRequest(f"draft_policy: expected off, this server runs without a drafter, got {wanted!r}")
            return Off()
        if policy is None or request.max_draft_tokens == 0:
            return Off()
        if wanted is None and policy.adaptive and request.sampling.seed is not None and not request.sampling.greedy:
            return SEEDED
        return policy

    def _prompt(self, request: GenerationRequest) -> tuple[Sequence[int], str]:
        if request.input_ids is not None:
            text = self._tokenizer.decode(request.input_ids) if request.echo and self._tokenizer else ""
            return request.input_ids, text
        name, text = ("text_input", request.text) if request.text is not None else ("messages", request.messages or "")
        assert text is not None
        if self._tokenizer is None:
            raise InvalidRequest(f"{name}: this model was exported without a tokenizer; send input_ids instead")
        size = len(text.encode("utf-8", errors="surrogatepass"))
        if size > self._max_prompt_bytes:
            raise InvalidRequest(
                f"{name}: expected at most {self._max_prompt_bytes} bytes (a context of {self._max_context} tokens), "
                f"got {size}; shorten the prompt"
            )
        if request.messages is not None:
            text = self._chat.render(text)
            return self._tokenizer.encode(text, add_special_tokens=False), text
        return self._tokenizer.encode(text), text

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for index, token in enumerate(token_ids):
            if not 0 <= token < self._artifact.vocab_size:
                raise InvalidRequest(
                    f"{name}: expected ids from 0 to {self._artifact.vocab_size - 1}, got {token} at index {index}"
                )

    def _bad_words(self, words: Sequence[str]) -> BadWords:
        """Each word as it is spelled inside a text: with a space in front, and without."""
        if not words:
            return BadWords()
        if self._tokenizer is None:
            raise InvalidRequest("bad_words: expected none, this model was exported without a tokenizer")
        spellings: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip(" ")):
                ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                # A spelling with a token outside the model's vocabulary can never come.
                if ids and max(ids) < self._artifact.vocab_size:
                    spellings[ids] = None
        return BadWords(tuple(spellings))
