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
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.training.record import TargetRecord
from dspark_export.training.recording import RecordingStage

_POLL_SECONDS = 0.25
_PREFILL = 512


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
    record: TargetRecord | None = None
    """What the target said along the whole text, where that was asked for."""


class _Collector:
    """Implements :class:`~dspark_backend.sequence.Sink`."""

    def __init__(
        self,
        index: int,
        given: tuple[int, ...],
        done: queue.SimpleQueue[tuple[int, Continuation | DSparkError]],
        recorder: RecordingStage | None,
    ) -> None:
        self._index = index
        self._given = given
        self._done = done
        self._recorder = recorder
        self._token_ids: list[int] = []

    def delta(self, delta: Delta, last: bool) -> None:
        self._token_ids += delta.token_ids
        if last:
            ended = delta.finish_reason is FinishReason.STOP
            record = None
            if self._recorder is not None and self._token_ids:
                # On the engine's thread, before the slot is used again.
                record = self._recorder.claim([*self._given, *self._token_ids], len(self._given))
            self._done.put((self._index, Continuation(tuple(self._token_ids), ended, record)))

    def error(self, error: DSparkError) -> None:
        self._done.put((self._index, error))


class Generator:
    """An engine over the target alone. It starts with the first draw and runs until ``close``."""

    def __init__(self, verifier: Path, max_length: int, slots: int, threads: int) -> None:
        """``max_length``: most tokens of a text, the part that is given included."""
        self._config = EngineConfig(
            verifier=verifier,
            max_slots=slots,
            max_context=max_length,
            max_queue_size=1 << 20,
            threads=threads,
            kv_budget_mib=1 << 20,
            prefill_chunk=_PREFILL,
            prefill_chunk_busy=_PREFILL,
            # Recorded rows must be the text's own.
            prefix_reuse=False,
        )
        self._runner: EngineRunner | None = None
        self._recorder: RecordingStage | None = None

    def draw(
        self,
        draws: Sequence[Draw],
        stop: Callable[[], bool],
        progress: Callable[[float], None],
        record: bool = False,
    ) -> list[Continuation]:
        """Continue every text, in order. The same draws give the same tokens, whatever runs beside them.

        With ``record`` each comes with what the target said along it.

        Raises:
            Stopped: ``stop`` said so before all were done.
            DSparkError: the artifact does not load, or a request failed.
        """
        if self._runner is None or self._recorder is None:
            stage = OnnxRuntimeVerifier(self._config.verifier, self._config.threads)
            self._recorder = RecordingStage(stage, self._config.max_context)
            self._runner = EngineRunner(self._recorder, None, self._config)
        self._recorder.recording = record
        done: queue.SimpleQueue[tuple[int, Continuation | DSparkError]] = queue.SimpleQueue()
        states = [
            self._runner.submit(
                GenerationRequest(
                    input_ids=draw.token_ids,
                    max_tokens=draw.max_tokens,
                    sampling=SamplingParams(temperature=draw.temperature, seed=draw.seed),
                    stream=False,
                ),
                _Collector(index, draw.token_ids, done, self._recorder if record else None),
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
            self._runner = self._recorder = None
