"""Prompt files: JSON lines (``prompt``, ``text``, ``turns`` or ``messages``) or plain text, a prompt a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspark_export.errors import ExportError


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Chat messages, as JSON, of each prompt of a file: a single user turn, or what ``messages`` holds.

    Of ``turns`` the first is taken. Raises ExportError for a missing or empty file, one that is no UTF-8 text, or a
    line that holds no prompt.
    """
    if not path.is_file():
        raise ExportError(f"--prompts {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExportError(f"--prompts {path}: expected UTF-8 text, got an invalid byte at {error.start}") from None
    prompts = []
    # Not splitlines(): that also splits at line separators which JSON writers leave inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        prompts.append(_messages(path, number, line))
        if len(prompts) == limit:
            break
    if not prompts:
        raise ExportError(f"--prompts {path}: expected at least one prompt, the file is empty")
    return prompts


def _messages(path: Path, number: int, line: str) -> str:
    if path.suffix not in (".jsonl", ".json"):
        return _user_turn(line)
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ExportError(f"{path}, line {number}: expected JSON, got {error}") from error
    if isinstance(entry, str):
        return _user_turn(entry)
    if isinstance(entry, dict):
        if isinstance(entry.get("messages"), list):
            return json.dumps(entry["messages"])
        turns = entry.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else entry.get("prompt", entry.get("text"))
        if isinstance(text, str):
            return _user_turn(text)
    raise ExportError(f"{path}, line {number}: expected a string, or an object with prompt, text, turns or messages")


def _user_turn(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}])
