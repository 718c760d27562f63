"""Prompts to answer: from files, and from the target itself, which writes a user turn where one would stand."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dspark_backend.chat import ChatTemplate, parse_messages
from dspark_backend.errors import InvalidRequest
from dspark_backend.stages.artifact import VerifierArtifact
from dspark_backend.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerSettings
from dspark_export.errors import ExportError
from dspark_export.prompts import read_prompts
from dspark_export.training.generate import Continuation
from dspark_export.training.openings import OWN, Opening

logger = logging.getLogger(__name__)

_MARK = "dspark-user-turn"
_SHORTEST_TURN = 8
"""Characters."""
_RAW_TOKENS = 16
"""Most tokens that start a text where the target has no chat template."""


@dataclass(frozen=True)
class Prompt:
    """What an answer is generated for."""

    token_ids: tuple[int, ...]
    key: int
    """Equal for prompts that differ in case and white space only."""
    domain: str = OWN


def prompt_key(text: str) -> int:
    """64 bits of a text, blind to case and to how it is spaced."""
    normal = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


class UserTurns:
    """Makes prompts for one target. Without a chat template a prompt is the beginning of a text."""

    def __init__(self, verifier: Path, artifact: VerifierArtifact, prompt_tokens: int) -> None:
        """``prompt_tokens``: most tokens of a prompt, the template's own not counted."""
        self._vocab_size = artifact.vocab_size
        self._bos = artifact.bos_token_id
        self._tokenizer: Tokenizer | None = None
        if (verifier / TOKENIZER_FILE).is_file():
            settings = TokenizerSettings(artifact.bos_token_id, artifact.eos_token_ids, artifact.add_bos)
            self._tokenizer = Tokenizer(verifier, settings)
        self._template = ChatTemplate(artifact.chat_template, artifact.bos_token, artifact.eos_token)
        self._opening: tuple[int, ...] | None = None
        overhead = 0
        if self._tokenizer is not None:
            opening = self._user_opening()
            if opening is not None:
                self._opening = tuple(self._tokenizer.encode(opening, add_special_tokens=False))
                overhead = len(self._render("") or ())
        self.prompt_tokens = prompt_tokens
        self.longest = overhead + prompt_tokens

    def _user_opening(self) -> str | None:
        """What the template puts before the words of a user; None without a template that takes one."""
        try:
            text = self._template.render(json.dumps([{"role": "user", "content": _MARK}]))
        except InvalidRequest:
            return None
        return text[: text.index(_MARK)] if _MARK in text else None

    def _render(self, text: str) -> tuple[int, ...] | None:
        return self._render_messages(json.dumps([{"role": "user", "content": text}]))

    def _render_messages(self, messages: str) -> tuple[int, ...] | None:
        assert self._tokenizer is not None
        try:
            rendered = self._template.render(messages)
        except InvalidRequest:
            return None
        return tuple(self._tokenizer.encode(rendered, add_special_tokens=False))

    def opening(self, random: np.random.Generator, chosen: Opening) -> tuple[int, ...]:
        """The tokens that the target continues with a prompt of its own.

        Raises:
            ExportError: the target has no chat template, and a beginning is to be put into one.
        """
        if self._opening:
            assert self._tokenizer is not None
            return (*self._opening, *self._tokenizer.encode(chosen.beginning, add_special_tokens=False))
        if chosen.beginning:
            raise ExportError("--openings: the verifier was exported without a chat template; leave --openings out")
        return (self._bos if self._bos is not None else int(random.integers(self._vocab_size)),)

    def opening_tokens(self, random: np.random.Generator) -> int:
        """How many tokens it may add."""
        most = min(_RAW_TOKENS, self.prompt_tokens)
        return self.prompt_tokens if self._opening else int(random.integers(min(2, most), most + 1))

    def from_target(self, opening: Sequence[int], chosen: Opening, turn: Continuation) -> Prompt | None:
        """The prompt that the target wrote behind an opening; None where it is none: cut off, empty, too long."""
        if not self._opening:
            ids = (*opening, *turn.token_ids)
            return Prompt(ids, prompt_key(" ".join(map(str, ids)))) if turn.token_ids else None
        assert self._tokenizer is not None
        written = self._tokenizer.decode(turn.token_ids)
        text = (chosen.beginning + (written if chosen.beginning else written.lstrip())).strip()
        # A replacement character is a broken one; a model that writes it wrote no text.
        if not turn.ended or len(text) < _SHORTEST_TURN or not any(map(str.isalpha, text)) or "\ufffd" in text:
            return None
        text += chosen.ending
        return self._checked(text, self._render(text), chosen.domain)

    def from_file(self, path: Path) -> list[Prompt]:
        """The prompts of a file, those that are too long left out.

        Raises:
            ExportError: there is no prompt in it, or the target has no tokenizer to read it with.
        """
        if self._tokenizer is None:
            raise ExportError(f"--prompts {path}: the verifier was exported without a tokenizer; leave --prompts out")
        given = read_prompts(path)
        found = [prompt for messages in given if (prompt := self._from_messages(messages, path.stem)) is not None]
        if len(found) < len(given):
            logger.warning(
                "--prompts %s: %d of %d are left out: longer than --prompt-tokens %d, or no messages for this target",
                path,
                len(given) - len(found),
                len(given),
                self.prompt_tokens,
            )
        return found

    def _from_messages(self, messages: str, domain: str) -> Prompt | None:
        assert self._tokenizer is not None
        try:
            parsed = parse_messages(messages)
        except InvalidRequest:
            return None
        contents = [message.get("content", "") for message in parsed]
        words = "\n".join(contents)
        ids = self._render_messages(messages) if self._opening else tuple(self._tokenizer.encode(words))
        # A single user turn is known by its words alone: the target may write the same.
        if len(parsed) > 1 or parsed[0]["role"] != "user":
            words = "\n".join([*(message["role"] for message in parsed), words])
        return self._checked(words, ids, domain)

    def _checked(self, text: str, ids: tuple[int, ...] | None, domain: str) -> Prompt | None:
        if not ids or len(ids) > self.longest or max(ids) >= self._vocab_size:
            return None
        return Prompt(ids, prompt_key(text), domain)
