"""Running the real engine in tests: sinks that keep what they get, and a driver without a thread."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dspark_backend.config import EngineConfig
from dspark_backend.delta import Delta, FinishReason
from dspark_backend.engine import Engine
from dspark_backend.errors import DSparkError
from dspark_backend.preparation import Preparer
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_backend.runner import EngineRunner, load_tokenizer
from dspark_backend.sequence import RequestState
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_backend.stages.protocol import VerifierStage

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
"""For large models: both of a small machine's processors, unless tests run on the other one meanwhile."""


@dataclass(eq=False)
class KeepingSink:
    """Implements Sink; ``wait`` blocks until the request ended."""

    deltas: list[Delta] = field(default_factory=list)
    failure: DSparkError | None = None
    ends: int = 0
    """How often an end was announced; 1 when all is well."""
    ended: threading.Event = field(default_factory=threading.Event)

    def delta(self, delta: Delta, last: bool) -> None:
        assert not self.ended.is_set(), "a result after the end"
        self.deltas.append(delta)
        if last:
            self._end()

    def error(self, error: DSparkError) -> None:
        assert not self.ended.is_set(), "an error after the end"
        self.failure = error
        self._end()

    def _end(self) -> None:
        self.ends += 1
        self.ended.set()

    def wait(self, seconds: float = 60.0) -> KeepingSink:
        assert self.ended.wait(seconds), f"the request did not end within {seconds} s"
        return self

    def of(self, index: int = 0) -> list[Delta]:
        return [delta for delta in self.deltas if delta.sequence_index == index]

    def tokens(self, index: int = 0) -> list[int]:
        assert self.failure is None, self.failure
        return [token for delta in self.of(index) for token in delta.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.of(index))

    def log_probs(self, index: int = 0) -> list[float]:
        return [value for delta in self.of(index) for value in delta.log_probs]

    def reason(self, index: int = 0) -> FinishReason | None:
        return self.of(index)[-1].finish_reason


def ids(*token_ids: int, **options: Any) -> GenerationRequest:
    """A request of token ids; options of SamplingParams and GenerationRequest mixed."""
    return request(input_ids=tuple(token_ids), **options)


def request(**options: Any) -> GenerationRequest:
    names = SamplingParams.__dataclass_fields__.keys()
    sampling = {key: options.pop(key) for key in list(options) if key in names}
    return GenerationRequest(sampling=SamplingParams(**sampling), **options)


class Driver:
    """The engine on the test's own thread: every ``step`` is one round."""

    def __init__(self, artifact: Path, stage: VerifierStage | None = None, **settings: Any) -> None:
        self.config = EngineConfig(verifier=artifact, **{"threads": 1, "kv_budget_mib": 64} | settings)
        self.stage: Any = stage or OnnxRuntimeVerifier(artifact, self.config.threads)
        self.tokenizer = load_tokenizer(self.config, self.stage.artifact)
        self.engine = Engine(self.stage, self.tokenizer, self.config)
        self.preparer = Preparer(
            self.stage.artifact,
            self.tokenizer,
            self.engine.cache.max_context,
            self.config.max_slots,
            self.config.default_max_tokens,
        )

    def submit(self, wanted: GenerationRequest, sink: KeepingSink | None = None) -> tuple[RequestState, KeepingSink]:
        sink = sink or KeepingSink()
        state = RequestState(self.preparer.prepare(wanted), sink, time.time_ns())
        self.engine.submit(state)
        return state, sink

    def run(self, *wanted: GenerationRequest, limit: int = 2000) -> list[KeepingSink]:
        """Submit all at once and step until the engine is idle."""
        sinks = [self.submit(one)[1] for one in wanted]
        for _ in range(limit):
            if self.engine.idle:
                return sinks
            self.engine.step()
        raise AssertionError(f"not idle after {limit} steps")


def prompt(seed: int, length: int) -> tuple[int, ...]:
    """Random token ids that every golden model has."""
    return tuple(np.random.default_rng(seed).integers(0, 300, length).tolist())


def alone(artifact: Path, wanted: GenerationRequest, **settings: Any) -> KeepingSink:
    """The answer of an engine that has nothing else to do."""
    return Driver(artifact, **settings).run(wanted)[0]


def mixed_requests() -> list[GenerationRequest]:
    """Nine requests of all lengths, greedy and sampled."""
    requests = []
    for index in range(9):
        options: dict[str, Any] = {"max_tokens": 6 + 5 * index, "seed": index}
        if index % 3 == 1:
            options |= {"temperature": 1.0, "top_p": 0.9}
        if index % 3 == 2:
            options |= {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2, "presence_penalty": 0.3}
        requests.append(ids(*prompt(index, 1 + 23 * index), **options))
    return requests


def open_runner(artifact: Path, **settings: Any) -> EngineRunner:
    return EngineRunner.open(EngineConfig(verifier=artifact, **{"threads": 1, "kv_budget_mib": 64} | settings))
