"""The two kinds of systems that the comparison of engines measures, behind one call."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from dspark_client import DSparkClient, GenerateOptions
from speed import load
from speed.peer_process import PeerProcess
from speed.prompts import BenchPrompt


@dataclass(frozen=True)
class Question:
    """A prompt as chat messages, and the same as token ids of the model's template."""

    prompt: BenchPrompt
    ids: list[int]


@dataclass(frozen=True)
class Measured:
    """One segment of one system."""

    system: str
    streams: int
    part: int
    tokens: int
    seconds: float
    per_stream: float
    """Tokens a second after the first, median over answers."""
    first_token_ms: float
    """Median over answers; engines that answer in batches are not asked before the batch begins."""
    foreign_cores: float


@dataclass(frozen=True)
class Timing:
    """What a system's answers to some questions took."""

    tokens: int
    seconds: float
    per_stream: float
    first_token_ms: float


class Contestant(Protocol):
    """A system that answers greedily."""

    name: str
    precision: str

    def answer(self, questions: Sequence[Question], streams: int, tokens: int) -> Timing: ...

    def next_tokens(self, prefixes: Sequence[Sequence[int]], streams: int) -> list[int]:
        """The most probable token after each prefix."""
        ...


class Ours:
    """A running server, asked by the asyncio client with one policy."""

    def __init__(self, url: str, precision: str, policy: str) -> None:
        self.name = f"dspark {policy}"
        self.precision = precision
        self._url, self._policy = url, policy

    def answer(self, questions: Sequence[Question], streams: int, tokens: int) -> Timing:
        prompts = [question.prompt for question in questions]
        done = load.run(self._url, self._policy, streams, prompts, prompts, tokens, keep_up=False)
        for answer in done.answers:
            (asked,) = {len(question.ids) for question in questions if question.prompt.name == answer.prompt}
            assert answer.input_tokens == asked, "the server and the peers got different prompts"
        return Timing(
            done.tokens,
            done.seconds,
            statistics.median(answer.per_second for answer in done.answers),
            statistics.median(answer.first_token_ms for answer in done.answers),
        )

    def next_tokens(self, prefixes: Sequence[Sequence[int]], streams: int) -> list[int]:
        options = GenerateOptions(max_tokens=1, ignore_eos=True, temperature=0.0, draft_policy="off")
        with DSparkClient(self._url) as client, ThreadPoolExecutor(streams) as pool:
            answers = pool.map(lambda ids: client.generate(input_ids=ids, options=options)[0].token_ids[0], prefixes)
            return list(answers)


class Peer:
    """Another engine's process."""

    def __init__(self, process: PeerProcess) -> None:
        self.name, self.precision = process.version, process.precision
        self._process = process

    def answer(self, questions: Sequence[Question], streams: int, tokens: int) -> Timing:
        replies, seconds = self._process.generate([question.ids for question in questions], streams, tokens)
        return Timing(
            sum(len(reply.ids) for reply in replies),
            seconds,
            statistics.median((len(reply.ids) - 1) / reply.decode_secs for reply in replies),
            1e3 * statistics.median(reply.first_secs for reply in replies),
        )

    def continuations(self, questions: Sequence[Question], streams: int, tokens: int) -> list[list[int]]:
        """The token ids of the answers."""
        replies, _ = self._process.generate([question.ids for question in questions], streams, tokens)
        return [reply.ids for reply in replies]

    def next_tokens(self, prefixes: Sequence[Sequence[int]], streams: int) -> list[int]:
        replies, _ = self._process.generate(prefixes, streams, 1)
        return [reply.ids[0] for reply in replies]
