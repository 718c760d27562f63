"""Prompts of several domains, a file each, and what perf_analyzer reads them from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_load.errors import LoadError

LENGTHS = (0.5, 1.25, 0.75, 1.5, 1.0)
"""Of successive answers, over the mean. With equal ones the streams of a policy that gives each a token a step would
all end and begin at once, and its prompts never meet anybody's answer."""


@dataclass(frozen=True)
class Prompt:
    """A user turn. ``domain`` is the name of its file."""

    domain: str
    text: str

    @property
    def messages(self) -> str:
        """As chat requests carry it."""
        return json.dumps([{"role": "user", "content": self.text}])


def read(folder: Path, seed: int) -> list[Prompt]:
    """The prompts of every ``*.jsonl`` of a folder, shuffled by the seed, domains taking turns.

    A line is ``{"turns": [...]}``, of which the first is taken, or ``{"prompt": ...}``. A domain ends with the
    shortest file: any stretch of the list holds all domains alike.

    Raises:
        LoadError: there is no such file, or a line holds no prompt.
    """
    domains = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")
        found = [_prompt(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        random.Random(f"{seed}/{path.stem}").shuffle(found)
        domains.append(found)
    if not domains or not all(domains):
        raise LoadError(f"--prompts {folder}: expected *.jsonl files, a domain each, with a prompt a line")
    return [prompt for row in zip(*domains, strict=False) for prompt in row]


def _prompt(path: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
        text = entry["turns"][0] if "turns" in entry else entry["prompt"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise LoadError(f'{path}:{number}: expected {{"turns": ["..."]}} or {{"prompt": "..."}}, got {line[:60]!r}')
    return Prompt(path.stem, text)


def stretch(prompts: Sequence[Prompt], start: int, count: int) -> list[Prompt]:
    """``count`` prompts from ``start`` on, from the beginning again after the last."""
    return [prompts[(start + index) % len(prompts)] for index in range(count)]


def input_data(asked: Sequence[tuple[Prompt, str]], tokens: int, chat: bool) -> dict[str, Any]:
    """perf_analyzer's ``--input-data``: greedy answers of exactly so many tokens, streamed.

    Args:
        tokens: of an answer in the mean; each prompt has a share of it (``LENGTHS``), whatever the policy.
        asked: prompts, each with its policy.
        chat: as messages, for the model's template; else as plain text.
    """

    def entry(index: int, prompt: Prompt, policy: str) -> dict[str, list[Any]]:
        length = max(2, round(tokens * LENGTHS[index % len(LENGTHS)]))
        inputs: dict[str, list[Any]] = {"messages": [prompt.messages]} if chat else {"text_input": [prompt.text]}
        inputs |= {"max_tokens": [length], "stream": [True], "ignore_eos": [True], "draft_policy": [policy]}
        return inputs

    return {"data": [entry(index, prompt, policy) for index, (prompt, policy) in enumerate(asked)]}
