"""The prompts of a run: some of every domain, chosen by a seed, in an order that keeps the domains mixed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_export.prompts import read_prompts

DOMAINS = ("gsm8k", "mbpp", "mt-bench")


@dataclass(frozen=True)
class BenchPrompt:
    """One user turn."""

    domain: str
    number: int
    """Line of its file, from 0."""
    messages: str
    """JSON, as chat requests carry it."""

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.number}"

    @property
    def chat(self) -> list[dict[str, object]]:
        """The messages, as the client takes them."""
        messages: list[dict[str, object]] = json.loads(self.messages)
        return messages


def choose(folder: Path, per_domain: int, seed: int) -> list[BenchPrompt]:
    """``per_domain`` prompts of each file of ``folder``, domains taking turns: any piece of the list is mixed.

    Raises:
        SystemExit: a file holds fewer.
        ExportError: a file is missing or holds something else.
    """
    by_domain = []
    for domain in DOMAINS:
        found = read_prompts(folder / f"{domain}.jsonl")
        if len(found) < per_domain:
            raise SystemExit(f"{domain}.jsonl: expected at least {per_domain} prompts, got {len(found)}")
        numbers = random.Random(f"{seed}/{domain}").sample(range(len(found)), per_domain)
        by_domain.append([BenchPrompt(domain, number, found[number]) for number in numbers])
    return [prompt for row in zip(*by_domain, strict=True) for prompt in row]


def split(prompts: Sequence[BenchPrompt], parts: int, part: int, least: int) -> list[BenchPrompt]:
    """The prompts of one part: an even share, and the ones after it where the share is smaller than ``least``."""
    start, end = part * len(prompts) // parts, (part + 1) * len(prompts) // parts
    count = min(max(end - start, least), len(prompts))
    return [prompts[(start + index) % len(prompts)] for index in range(count)]


def fingerprint(prompts: Sequence[BenchPrompt]) -> str:
    """Tells one choice of prompts from another."""
    return hashlib.sha256("\0".join(prompt.messages for prompt in prompts).encode()).hexdigest()[:12]
