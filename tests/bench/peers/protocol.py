"""What the benchmark asks of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Settings:
    """What an engine is opened with."""

    gguf: Path
    checkpoint: Path
    """The same weights as a Hugging Face folder in float32."""
    genai: Path
    """The same as a folder of ONNX Runtime GenAI, int4."""
    threads: int
    streams: int
    """Most prompts at once."""
    context: int
    """Most tokens of a prompt and its answer."""


@dataclass(frozen=True)
class Reply:
    """One greedy answer. Seconds count from the moment in which its engine was handed the prompt."""

    ids: list[int]
    first_secs: float
    decode_secs: float
    """From the first token to the last."""


class Engine(Protocol):
    """An opened engine."""

    precision: str
    version: str

    def generate(self, prompts: Sequence[Sequence[int]], streams: int, tokens: int) -> list[Reply]:
        """Continue each prompt greedily by exactly ``tokens`` tokens, end-of-sequence ones among them, ``streams``
        prompts at once. Replies in the order of the prompts."""
        ...
