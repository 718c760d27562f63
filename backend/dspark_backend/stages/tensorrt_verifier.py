"""The verifier on TensorRT: cache, logits and features stay on the device; argmax and top logit come back.

For requests that draw tokens the most probable ones come back, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dspark_backend.stages.artifact import VerifierArtifact, load_verifier_artifact
from dspark_backend.stages.batch import FloatArray, RankedRows, RowMove, StepBatch, StepOutput
from dspark_backend.stages.cuda.rows import DeviceRows, RowSpan
from dspark_backend.stages.cuda.weights import shared_matrix
from dspark_backend.stages.engine_contract import (
    SAMPLER_ENGINE,
    VERIFIER_ENGINE,
    CacheShape,
    SamplerTensors,
    VerifierTensors,
)
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD
from dspark_backend.stages.tensorrt.cache import EngineCache
from dspark_backend.stages.tensorrt.execution import Execution
from dspark_backend.stages.tensorrt.opening import CudaOpener, EngineOpener, check_runtime, compute_dtype
from dspark_backend.stages.tensorrt.profiles import choose, engine_profiles, most
from dspark_backend.stages.tensorrt.scatter import View, fill_verifier, span
from dspark_backend.stages.tensorrt.slot_stage import SlotStage

_SYMBOLS = ("B", "N", "R", "Q", "C")
_LOGITS = "logits"
_PREFILL_COLUMNS = 32
"""Steps with longer segments are prompts: too many sizes for a CUDA graph each, and long enough without."""


class TensorRtVerifier(SlotStage):
    """Implements :class:`~dspark_backend.stages.protocol.VerifierStage`.

    Raises:
        ArtifactError: the artifact is missing or corrupt, or its engine does not fit this GPU or this TensorRT.
        ConfigError: there is no device.
    """

    def __init__(self, directory: Path, settings: StageSettings, opener: EngineOpener | None = None) -> None:
        artifact = load_verifier_artifact(directory)
        check_runtime(artifact.runtime, directory)
        dtype = compute_dtype(artifact.dtype, directory)
        opener = opener or CudaOpener(settings)
        info = opener.check(artifact.engine, directory)
        self._artifact = replace(artifact, engine=info)
        profiles = engine_profiles(info, VERIFIER_ENGINE, _SYMBOLS)
        shapes = artifact.cache_shapes
        caches = [CacheShape(heads, head_dim) for heads, head_dim in shapes]
        taps = len(artifact.target_layer_ids)
        specs = VerifierTensors(
            dtype, artifact.vocab_size, artifact.hidden_size, taps, info.capacity, caches
        ).specs  # fmt: skip
        self._device = opener.device
        engine = opener.engine(directory, VERIFIER_ENGINE, info, specs, len(profiles))
        self._cache = EngineCache(self._device, shapes, info.capacity, dtype, profiles)
        elsewhere = (*self._cache.names, SHARED_EMBEDDING, SHARED_HEAD)
        self._execution = Execution(self._device, engine, specs, profiles, elsewhere)
        profiles = engine_profiles(info, SAMPLER_ENGINE, ("N",))
        specs = SamplerTensors(artifact.vocab_size).specs
        engine = opener.engine(directory, SAMPLER_ENGINE, info, specs, len(profiles))
        self._sampler = Execution(self._device, engine, specs, profiles, (_LOGITS,))
        # Held, so that the drafter's stage finds them.
        self._shared = {
            SHARED_EMBEDDING: shared_matrix(self._device, directory, artifact.embedding, dtype),
            SHARED_HEAD: shared_matrix(self._device, directory, artifact.head, dtype),
        }
        self._view_length = 1

    @property
    def artifact(self) -> VerifierArtifact:
        return self._artifact

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self._device.use()
        if self._cache.allocate(num_slots, moves):
            self._execution.forget_addresses()
        self._view_length = capacity

    def step(self, batch: StepBatch) -> StepOutput:
        self._device.use()
        execution, cache, wanted = self._execution, self._cache, len(batch.logit_rows)
        needed = {
            "B": batch.num_tokens,
            "N": max(1, wanted),
            "R": span(batch.slots),
            "Q": batch.layout.longest,
            "C": int(batch.positions.max()) + 1,
        }
        # How far attention looks follows the cache's length as the engine sees it, which rarely changes.
        needed["C"] = max(needed["C"], min(self._view_length, most(execution.profiles, "C")))
        choice = choose(execution.profiles, needed, {"R": cache.num_slots, "C": needed["C"]})
        view = View.over(batch.slots, choice.sizes["R"], cache.num_slots)
        arrays = execution.inputs(choice)
        fill_verifier(arrays, batch, view, choice.sizes, cache.capacity)
        bound = cache.addresses(view.first) | {name: memory.address for name, memory in self._shared.items()}
        execution.run(choice, arrays, bound, view.first, capture=choice.sizes["Q"] <= _PREFILL_COLUMNS)
        ranked = None if batch.temperatures is None else self._rank(batch.temperatures, choice.sizes["N"])
        argmax, top_logit = execution.results(choice, ("argmax", "top_logit"))
        return StepOutput(
            logits=self._rows(_LOGITS, wanted, self._artifact.vocab_size),
            argmax=argmax[:wanted],
            top_logit=top_logit[:wanted],
            features=self._rows("features", batch.num_tokens, self._artifact.feature_size),
            ranked=ranked,
        )

    def close(self) -> None:
        self._device.use()
        self._execution.close()
        self._sampler.close()
        self._cache.clear()
        self._shared.clear()

    def _rank(self, temperatures: FloatArray, rows: int) -> RankedRows:
        """The most probable tokens of the step that is under way. ``rows``: of its logits, with those that fill it up.

        Waits for the device.
        """
        sampler, wanted = self._sampler, len(temperatures)
        choice = choose(sampler.profiles, {"N": rows}, {"N": rows})
        arrays = sampler.inputs(choice)
        # Rows that nobody draws from are ranked like the others.
        temperature = arrays["temperature"]
        temperature[:] = 1.0
        np.copyto(temperature[:wanted], temperatures, where=temperatures > 0.0)
        bound = {_LOGITS: self._execution.device_address(_LOGITS)}
        sampler.run(choice, arrays, bound, 0, capture=True)
        ids, logits, exp_sum = sampler.results(choice, ("ranked_ids", "ranked_logits", "exp_sum"))
        return RankedRows(ids[:wanted], logits[:wanted], exp_sum[:wanted], self._artifact.vocab_size)

    def _rows(self, name: str, count: int, width: int) -> DeviceRows:
        execution = self._execution
        return DeviceRows(self._device, width, (RowSpan(execution.memory, 0, count, execution.offset(name)),))
