"""Text to token ids and back, through the ``tokenizer.json`` of an artifact directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from dspark_backend.errors import ArtifactError, InvalidRequest
from dspark_backend.text_decoder import DecoderPlan

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_LONG_CHARS = 2048
"""Tokenized in less than two milliseconds."""


@dataclass(frozen=True)
class TokenizerSettings:
    """What the tokenizer's own file does not say."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    """Raw text prompts get BOS in front (True), get nothing (False), or what the file's post-processor says (None)."""

    def __post_init__(self) -> None:
        if self.add_bos and self.bos_token_id is None:
            raise ArtifactError("tokenizer: add_bos is set but bos_token_id is not; export the model again")


class Tokenizer:
    """A loaded tokenizer. Immutable, and safe to use from several threads at once."""

    def __init__(self, directory: Path, settings: TokenizerSettings | None = None) -> None:
        """Load ``directory/tokenizer.json``.

        Raises:
            ArtifactError: the file is missing or corrupt, its decoder cannot be streamed, or the settings name a token
                it does not have.
        """
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise ArtifactError(f"{path}: expected the model's tokenizer, found no such file; export the model again")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:
            _raise_interrupts(error)
            raise ArtifactError(
                f"{path}: expected a tokenizer of the Hugging Face tokenizers library: {error}"
            ) from error
        # A file saved after training may ask for padding or truncation: both would silently alter prompts.
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self.settings = settings or TokenizerSettings()
        try:
            self.decoder_plan = DecoderPlan.parse(_decoder_spec(inner))
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error

        added = inner.get_added_tokens_decoder()
        by_id = {token_id: token for token, token_id in inner.get_vocab(with_added_tokens=False).items()}
        by_id.update({token_id: token.content for token_id, token in added.items()})
        self._vocab_size = max(by_id, default=-1) + 1
        self._tokens: list[str | None] = [by_id.get(token_id) for token_id in range(self._vocab_size)]
        self._special_tokens = frozenset(token.content for token in added.values() if token.special)
        bos = self.settings.bos_token_id
        if self.settings.add_bos and bos is not None and self.token(bos) is None:
            raise ArtifactError(
                f"{path}: bos_token_id names token {bos}, which this tokenizer (ids 0 to {self._vocab_size - 1}) "
                "does not have; export the model again"
            )
        for eos in self.settings.eos_token_ids:
            if self.token(eos) is None:
                logger.warning("%s: eos_token_ids names token %d, which this tokenizer does not have", path, eos)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. The model's logits may be wider (padding) or, rarely, narrower."""
        return self._vocab_size

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (not as text), or None where the id has none."""
        return self._tokens[token_id] if 0 <= token_id < self._vocab_size else None

    def is_special(self, token: str) -> bool:
        """Whether ``decode(skip_special_tokens=True)`` leaves this token out."""
        return token in self._special_tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens spelled out in it become their ids, as in vLLM and transformers.

        Args:
            text: the prompt.
            add_special_tokens: put BOS in front as ``settings.add_bos`` says. Pass False for rendered chat templates,
                which hold it already.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        with_processor = add_special_tokens and self.settings.add_bos is None
        try:
            if len(text) < _LONG_CHARS:
                encoding = self._inner.encode(text, add_special_tokens=with_processor)
            else:
                # Unlike encode() it lets other threads run meanwhile: the streams of a server must not stand still.
                (encoding,) = self._inner.encode_batch([text], add_special_tokens=with_processor)
            ids: list[int] = encoding.ids
        except BaseException as error:
            _raise_interrupts(error)
            raise InvalidRequest(f"text_input: expected Unicode text that this model can tokenize: {error}") from error
        if add_special_tokens and self.settings.add_bos and self.settings.bos_token_id is not None:
            ids.insert(0, self.settings.bos_token_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, special tokens left out by default; ids without a token (padded vocabularies) add nothing.

        Incomplete UTF-8 becomes U+FFFD. Negative ids raise InvalidRequest.
        """
        known = []
        for token_id in ids:
            if token_id < 0:
                raise InvalidRequest(f"token ids: expected 0 or more, got {token_id}")
            if token_id < self._vocab_size:
                known.append(token_id)
        text: str = self._inner.decode(known, skip_special_tokens=skip_special_tokens)
        return text


def _raise_interrupts(error: BaseException) -> None:
    """Pass on what is not the library's own: its panics are no subclass of Exception and would end a thread."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error


def _decoder_spec(inner: tokenizers.Tokenizer) -> dict[str, object] | None:
    """The ``decoder`` entry of tokenizer.json, from the loaded object (parsing a file of many MB again is slow)."""
    if inner.decoder is None:
        return None
    spec: dict[str, object] = json.loads(inner.decoder.__getstate__())
    return spec
