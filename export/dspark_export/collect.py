"""Rounds of speculation on given prompts: the engine itself runs them, and tells what became of every block."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dspark_backend.calibration import Calibration
from dspark_backend.config import EngineConfig
from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.delta import Delta
from dspark_backend.errors import DSparkError
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_backend.runner import EngineRunner, load_tokenizer
from dspark_backend.speculation import Drafting
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_backend.telemetry import RoundRecord

_NO_COST = CostModel((StepCurve(1, 128, (1, 2), (1.0, 1.0)),))
"""A fixed depth never looks at step times: none are measured."""


@dataclass(frozen=True)
class CollectPlan:
    """What to run."""

    verifier: Path
    drafter: Path
    max_tokens: int = 128
    temperature: float = 0.0
    threads: int = 0
    concurrency: int = 8


class _Done:
    """Counts requests that ended. Implements :class:`~dspark_backend.sequence.Sink`."""

    def __init__(self, ended: queue.SimpleQueue[DSparkError | None]) -> None:
        self._ended = ended

    def delta(self, delta: Delta, last: bool) -> None:
        if last:
            self._ended.put(None)

    def error(self, error: DSparkError) -> None:
        self._ended.put(error)


def collect_rounds(
    plan: CollectPlan, prompts: Sequence[str], progress: Callable[[float], None]
) -> list[RoundRecord]:  # fmt: skip
    """Run every prompt (chat messages as JSON) and return all rounds, each with its whole block verified.

    Raises:
        DSparkError: an artifact does not load or fit, or a request failed.
    """
    records: list[RoundRecord] = []
    config = EngineConfig(
        verifier=plan.verifier,
        drafter=plan.drafter,
        policy="fixed:1024",  # the whole block, whatever its size
        max_slots=plan.concurrency,
        max_queue_size=len(prompts) + 1,
        threads=plan.threads,
    )
    numbers: dict[int, int] = {}

    def observe(record: RoundRecord) -> None:
        records.append(replace(record, request=numbers.setdefault(record.request, len(numbers))))

    verifier = OnnxRuntimeVerifier(plan.verifier, plan.threads)
    drafter = OnnxRuntimeDrafter(plan.drafter, plan.verifier, plan.threads)
    drafting = Drafting(drafter, Calibration.identity(drafter.artifact.block_size), _NO_COST)
    runner = EngineRunner(verifier, load_tokenizer(config, verifier.artifact), config, drafting, observe)
    ended: queue.SimpleQueue[DSparkError | None] = queue.SimpleQueue()
    try:
        for seed, messages in enumerate(prompts):
            sampling = SamplingParams(temperature=plan.temperature, seed=seed)
            runner.submit(
                GenerationRequest(messages=messages, max_tokens=plan.max_tokens, sampling=sampling, stream=False),
                _Done(ended),
            )
        for count in range(len(prompts)):
            error = ended.get()
            if error is not None:
                raise error
            progress((count + 1) / len(prompts))
    finally:
        runner.stop()
    return records
