"""Text for the calibration of a precision, and other text to judge it by: dialogues that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from dspark_backend.chat import ChatTemplate
from dspark_backend.errors import InvalidRequest
from dspark_backend.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerSettings
from dspark_export.errors import ExportError
from dspark_export.prompts import read_prompts
from dspark_export.tokenizer_info import TokenizerInfo

_DIALOGUES = "dialogues.jsonl"
"""User turns and answers that SmolLM2 wrote: everyday questions, school mathematics, Python."""
_LONGEST = 512
"""Tokens of one text; longer ones are cut."""
_RANDOM_LENGTH = 128


@dataclass(frozen=True)
class Texts:
    """Token ids of two sets of texts that share none."""

    calibration: list[list[int]]
    held_out: list[list[int]]


def read_texts(
    file: Path | None,
    directory: Path,
    tokenizer: TokenizerInfo,
    vocab_size: int,
    calibration_tokens: int,
    held_out_tokens: int,
    max_context: int,
) -> Texts:
    """About ``calibration_tokens`` and at most ``held_out_tokens`` of ``file`` (as for prompts), or of our dialogues.

    ``directory`` holds the artifact's tokenizer; where it has none the texts are random ids. No text is longer than
    ``max_context``.

    Raises:
        ExportError: the file is no prompt file, or too short to leave anything to judge by.
    """
    readable = (directory / TOKENIZER_FILE).is_file()
    source = _encoded(file, directory, tokenizer) if readable else _random(vocab_size)
    longest = min(_LONGEST, max_context)
    calibration, judged = _take(source, calibration_tokens, longest), _take(source, held_out_tokens, longest)
    if not calibration or not judged:
        raise ExportError(
            f"--calibration-text {file}: expected more than {calibration_tokens} tokens, so that some are left to "
            "judge the result by; give more text or a smaller --calibration-tokens"
        )
    return Texts(calibration, judged)


def _take(source: Iterator[list[int]], tokens: int, longest: int) -> list[list[int]]:
    taken: list[list[int]] = []
    while tokens > 0 and (text := next(source, None)) is not None:
        taken.append(text[: min(tokens, longest)])
        tokens -= len(taken[-1])
    return taken


def _encoded(file: Path | None, directory: Path, info: TokenizerInfo) -> Iterator[list[int]]:
    encoder = Tokenizer(directory, TokenizerSettings(info.bos_token_id, tuple(info.eos_token_ids), info.add_bos))
    template = ChatTemplate(info.chat_template, info.bos_token, info.eos_token)
    for messages in read_prompts(file) if file is not None else _own_dialogues():
        try:
            ids = encoder.encode(template.render(messages, add_generation_prompt=False), add_special_tokens=False)
        except InvalidRequest:
            ids = encoder.encode("\n\n".join(message["content"] for message in json.loads(messages)))
        if ids:
            yield list(ids)


def _own_dialogues() -> Iterator[str]:
    text = files("dspark_export").joinpath("data", _DIALOGUES).read_text(encoding="utf-8")
    for line in text.splitlines():
        yield json.dumps(json.loads(line)["messages"])


def _random(vocab_size: int) -> Iterator[list[int]]:
    random = np.random.default_rng(0)
    while True:
        yield random.integers(vocab_size, size=_RANDOM_LENGTH).tolist()
