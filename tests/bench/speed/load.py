"""Load on a running server by the asyncio client: a number of streams that stays the same until the end."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np

from dspark_client import AsyncDSparkClient, GenerateOptions
from speed.prompts import BenchPrompt

_RUNNER = asyncio.Runner()
"""One event loop for all calls: grpc.aio's poller complains of each one that is closed before the process ends."""


@dataclass(frozen=True)
class Answer:
    """One finished request, timed by the client, counted by the server."""

    prompt: str
    input_tokens: int
    output_tokens: int
    first_token_ms: float
    decode_secs: float
    """From the first token to the last."""
    rounds: int
    """Verification steps after prefill."""
    verified: int
    """Draft tokens that the target checked."""
    accepted: int
    tokens_hash: str
    """Equal for equal answers."""

    @property
    def per_second(self) -> float:
        """Tokens after the first over the time that they took."""
        return (self.output_tokens - 1) / self.decode_secs

    @property
    def accepted_length(self) -> float:
        """Tokens a round, the target's own included."""
        return (self.output_tokens - 1) / max(self.rounds, 1)

    @property
    def budget(self) -> float:

        return 1 + self.verified / max(self.rounds, 1)


@dataclass(frozen=True)
class Load:
    """What one stretch of load gave."""

    answers: list[Answer]
    tokens: int
    """Received by all streams meanwhile, those of uncounted answers included."""
    seconds: float
    """From when all streams had begun to the end of the last counted answer."""


@dataclass
class _Run:
    client: AsyncDSparkClient
    options: GenerateOptions
    waiting: deque[BenchPrompt]
    fillers: Iterator[BenchPrompt]
    keep_up: bool
    left: int
    crowd: int
    """Streams whose first, uncounted answer has no token yet."""
    answers: list[Answer] = field(default_factory=list)
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)
    """When the crowd of the beginning was gone."""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self, lead: int) -> None:
        """One user: asks its next question as soon as the last is answered; the first for ``lead`` tokens alone."""
        if lead:
            await self.ask(next(self.fillers), lead)
        while self.waiting:
            self.answers.append(await self.ask(self.waiting.popleft()))
            self.left -= 1
        if self.left == 0:
            self.done.set()
        while self.keep_up and not self.done.is_set():
            await self.ask(next(self.fillers))

    async def ask(self, prompt: BenchPrompt, tokens: int | None = None) -> Answer:
        options = self.options if tokens is None else replace(self.options, max_tokens=tokens)
        begin = time.perf_counter()
        first = last = begin
        ids: list[int] = []
        usage = None
        async with aclosing(self.client.stream(messages=prompt.chat, options=options)) as pieces:
            async for piece in pieces:
                if piece.token_ids:
                    last = time.perf_counter()
                    if not ids:
                        first = last
                        if tokens is not None:
                            self.crowd -= 1
                            if self.crowd == 0:
                                self.began, self.tokens = last, 0
                    ids += piece.token_ids
                    self.tokens += len(piece.token_ids)
                usage = piece.usage or usage
        assert usage is not None and len(ids) == usage.output_tokens
        return Answer(
            prompt.name,
            usage.input_tokens,
            len(ids),
            1e3 * (first - begin),
            last - first,
            usage.rounds,
            usage.verified_draft_tokens,
            usage.accepted_draft_tokens,
            hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:12],
        )


def spread(tokens: int, streams: int) -> list[int]:
    """Tokens of each stream's first, uncounted answer: none for a single stream."""
    return [tokens * user // streams for user in range(1, streams + 1)] if streams > 1 else [0]


def run(
    url: str,
    policy: str,
    streams: int,
    prompts: Sequence[BenchPrompt],
    fillers: Sequence[BenchPrompt],
    tokens: int,
    keep_up: bool = True,
) -> Load:
    """Answer ``prompts`` greedily, ``streams`` at once, ``tokens`` each (the end of sequence is passed over).

    With ``keep_up``, streams that find no prompt left go on with ``fillers`` until the last prompt is answered, and are
    then cut off: every counted answer was made among as many others. Before it, each of several streams has a filler,
    of lengths that spread their beginnings evenly over an answer: begun together, streams that get a token a round
    would end together too, and never wait for each other's prompts, while those whose drafts stand unequally would.
    """

    async def go() -> Load:
        options = GenerateOptions(max_tokens=tokens, ignore_eos=True, temperature=0.0, draft_policy=policy)
        async with AsyncDSparkClient(url) as client:
            leads = spread(tokens, streams) if keep_up else [0] * streams
            crowd = sum(lead > 0 for lead in leads)
            work = _Run(client, options, deque(prompts), itertools.cycle(fillers), keep_up, len(prompts), crowd)
            users = [asyncio.create_task(work.stream(lead)) for lead in leads]
            ended = asyncio.create_task(work.done.wait())
            if keep_up:  # a user ends before `done` only by failing
                await asyncio.wait([ended, *users], return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.wait(users, return_when=asyncio.FIRST_EXCEPTION)
            seconds, received = time.perf_counter() - work.began, work.tokens
            ended.cancel()
            for user in users:
                if user.done():
                    user.result()
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
            return Load(work.answers, received, seconds)

    return _RUNNER.run(go())
