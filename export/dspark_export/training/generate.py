"""Text of the target, from our own engine, many sequences at a time."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_backend.config import EngineConfig
from dspark_backend.delta import Delta, FinishReason
from dspark_backend.errors import DSparkError
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_backend.runner import EngineRunner

_POLL_SECONDS = 0.25


class Stopped(Exception):
    """The run was asked to end while text was being generated."""


@dataclass(frozen=True)
class Draw:
    """A text to continue."""

    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    """0 is greedy."""
    seed: int


@dataclass(frozen=True)
class Continuation:
    """What the target wrote, the token that ended it included."""

    token_ids: tuple[int, ...]
    ended: bool
    """By the target's own end token; else it was cut at ``max_tokens``."""


class _Collector:
    """Implements :class:`~dspark_backend.sequence.Sink`."""

    def __init__(self, index: int, done: queue.SimpleQueue[tuple[int, Continuation | DSparkError]]) -> None:
        self._index = index
        self._done = done
        self._token_ids: list[int] = []

    def delta(self, delta: Delta, last: bool) -> None:
        self._token_ids += delta.token_ids
        if last:
            ended = delta.finish_reason is FinishReason.STOP
            self._done.put((self._index, Continuation(tuple(self._token_ids), ended)))

    def error(self, error: DSparkError) -> None:
        self._done.put((self._index, error))


class Generator:
    """An engine over the target alone. It starts with the first draw and runs until ``close``."""

    def __init__(self, verifier: Path, max_length: int, slots: int, threads: int) -> None:
        """``max_length``: most tokens of a text, the part that is given included."""
        self._config = EngineConfig(
            verifier=verifier, max_slots=slots, max_context=max_length, max_queue_size=1 << 20, threads=threads
        )
        self._runner: EngineRunner | None = None

    def draw(
        self, draws: Sequence[Draw], stop: Callable[[], bool], progress: Callable[[float], None]
    ) -> list[Continuation]:  # fmt: skip
        """Continue every text, in order. The same draws give the same tokens, whatever runs beside them.

        Raises:
            Stopped: ``stop`` said so before all were done.
            DSparkError: the artifact does not load, or a request failed.
        """
        if self._runner is None:
            self._runner = EngineRunner.open(self._config)
        done: queue.SimpleQueue[tuple[int, Continuation | DSparkError]] = queue.SimpleQueue()
        states = [
            self._runner.submit(
                GenerationRequest(
                    input_ids=draw.token_ids,
                    max_tokens=draw.max_tokens,
                    sampling=SamplingParams(temperature=draw.temperature, seed=draw.seed),
                    stream=False,
                ),
                _Collector(index, done),
            )
            for index, draw in enumerate(draws)
        ]
        found: dict[int, Continuation] = {}
        while len(found) < len(draws):
            if stop():
                for state in states:
                    self._runner.cancel(state)
                raise Stopped
            try:
                index, result = done.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(result, DSparkError):
                raise result
            found[index] = result
            progress(len(found) / len(draws))
        return [found[index] for index in range(len(draws))]

    def close(self) -> None:
        """End the engine and give its memory back; a later draw starts it again."""
        if self._runner is not None:
            self._runner.stop()
            self._runner = None
