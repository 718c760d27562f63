"""perf_analyzer's profile export (2.48) -> answers and the arrival of tokens.

The file is JSON but for one thing: BYTES and numbers are written as their raw bytes into strings, so it is no UTF-8.
Read as Latin-1 every character is one byte, and an INT32 tensor is four characters a value.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_load.answer import Answer
from dspark_load.errors import LoadError

_NS = 1e-9


@dataclass(frozen=True)
class Profile:
    """One run of the tool."""

    answers: list[Answer]
    """In order of sending."""
    arrivals: list[tuple[float, int]]
    """(seconds, tokens) of every response that carried some, in order."""


def read(path: Path, domains: Mapping[str, str]) -> Profile:
    """Parse an export. Seconds count from the first request's sending.

    Args:
        domains: the domain of each prompt, by what its request carried as ``messages`` or ``text_input``.

    Raises:
        LoadError: no JSON of this kind, no request in it, or a request that did not end.
    """
    try:
        text = path.read_bytes().decode("latin-1")
        requests = [request for run in json.loads(text, strict=False)["experiments"] for request in run["requests"]]
        requests.sort(key=lambda request: request["timestamp"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path}: expected a profile export of perf_analyzer, got {error!r}") from error
    if not requests:
        raise LoadError(f"{path}: expected finished requests, the export holds none; see the tool's output beside it")
    origin = requests[0]["timestamp"]
    arrivals: list[tuple[float, int]] = []
    answers = []
    for request in requests:
        pieces = [
            ((stamp - origin) * _NS, len(outputs["output_ids"]) // 4)
            for stamp, outputs in zip(request["response_timestamps"], request["response_outputs"], strict=False)
            if outputs.get("output_ids")
        ]
        answers.append(_answer(path, request, (request["timestamp"] - origin) * _NS, pieces, domains))
        arrivals += pieces
    return Profile(answers, sorted(arrivals))


def _answer(
    path: Path, request: Mapping[str, Any], sent: float, pieces: list[tuple[float, int]], domains: Mapping[str, str]
) -> Answer:
    last = request["response_outputs"][-1] if request["response_outputs"] else {}
    if not pieces or not last.get("num_output_tokens"):
        raise LoadError(
            f"{path}: a request ended without num_output_tokens in its last response: the server refused it or it was "
            "cut off; look into the server's log"
        )
    tokens = _int32(last["num_output_tokens"])
    received = sum(count for _, count in pieces)
    if tokens != received:
        raise LoadError(
            f"{path}: the server counted {tokens} tokens, the responses held {received}: responses are lost"
        )
    inputs = request.get("request_inputs", {})
    # Latin-1 reading made a character of each byte; prompts are UTF-8.
    asked = str(inputs.get("messages") or inputs.get("text_input") or "").encode("latin-1").decode(errors="replace")
    return Answer(
        sent,
        pieces[0][0],
        pieces[-1][0],
        tokens,
        _int32(last["num_rounds"]),
        _int32(last["total_verified_draft_tokens"]),
        _int32(last["total_accepted_draft_tokens"]),
        domains.get(asked, ""),
    )


def _int32(text: str) -> int:
    value: int = struct.unpack("<i", text.encode("latin-1")[:4])[0]
    return value
