"""The drafter on TensorRT: features come from the verifier on the device, drafts are drawn there, tokens return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dspark_backend.stages.artifact import DrafterArtifact, check_pair, load_drafter_artifact, load_verifier_artifact
from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.cuda.device import Memory
from dspark_backend.stages.cuda.rows import DeviceRows
from dspark_backend.stages.cuda.weights import matrix_rows, shared_matrix
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch, DraftOutput
from dspark_backend.stages.engine_contract import CONTEXT_ENGINE, DRAFT_ENGINE, CacheShape, DrafterTensors
from dspark_backend.stages.rows import Rows
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD, read_d2t
from dspark_backend.stages.tensorrt.cache import EngineCache
from dspark_backend.stages.tensorrt.execution import Execution
from dspark_backend.stages.tensorrt.opening import CudaOpener, EngineOpener, check_runtime, compute_dtype
from dspark_backend.stages.tensorrt.profiles import choose, engine_profiles, most
from dspark_backend.stages.tensorrt.scatter import View, fill_context, fill_draft, pieces, rows_per_slot, span
from dspark_backend.stages.tensorrt.slot_stage import SlotStage

_CONTEXT_SYMBOLS = ("M", "R", "W")
_DRAFT_SYMBOLS = ("M", "D", "R", "W", "C")
_FEATURES = "features"


class TensorRtDrafter(SlotStage):
    """Implements :class:`~dspark_backend.stages.protocol.DrafterStage`.

    Raises:
        ArtifactError: an artifact is missing or corrupt, the drafter is of another verifier, or an engine does not fit
            this GPU or this TensorRT.
        ConfigError: there is no device.
    """

    def __init__(
        self, directory: Path, verifier_directory: Path, settings: StageSettings, opener: EngineOpener | None = None
    ) -> None:
        artifact = load_drafter_artifact(directory)
        verifier = load_verifier_artifact(verifier_directory, check_contents=False)
        check_pair(artifact, verifier)
        check_runtime(artifact.runtime, directory)
        dtype = compute_dtype(artifact.dtype, directory)
        opener = opener or CudaOpener(settings)
        info = opener.check(artifact.engine, directory)
        self._artifact = replace(artifact, engine=info)
        self._device = device = opener.device
        tensors = DrafterTensors(
            compute=dtype,
            vocab_size=artifact.vocab_size,
            draft_vocab_size=artifact.draft_vocab_size,
            hidden_size=artifact.hidden_size,
            num_taps=len(artifact.target_layer_ids),
            capacity=info.capacity,
            caches=[CacheShape(heads, head_dim) for heads, head_dim in artifact.cache_shapes],
            block_size=artifact.block_size,
            num_candidates=artifact.num_candidates,
        )
        profiles = engine_profiles(info, DRAFT_ENGINE, _DRAFT_SYMBOLS)
        context_profiles = engine_profiles(info, CONTEXT_ENGINE, _CONTEXT_SYMBOLS)
        draft = opener.engine(directory, DRAFT_ENGINE, info, tensors.draft_specs, len(profiles))
        context = opener.engine(directory, CONTEXT_ENGINE, info, tensors.context_specs, len(context_profiles))
        self._cache = EngineCache(
            device, artifact.cache_shapes, info.capacity, dtype, (*profiles, *context_profiles)
        )  # fmt: skip
        elsewhere = (*self._cache.names, SHARED_EMBEDDING, SHARED_HEAD)
        self._draft = Execution(device, draft, tensors.draft_specs, profiles, elsewhere)
        self._context = Execution(device, context, tensors.context_specs, context_profiles, elsewhere)
        head = verifier.head
        reduced = artifact.draft_vocab_size != artifact.vocab_size
        self._shared: dict[str, Memory] = {
            SHARED_EMBEDDING: shared_matrix(device, verifier_directory, verifier.embedding, dtype),
            SHARED_HEAD: matrix_rows(device, verifier_directory, head, read_d2t(artifact, directory))
            if reduced
            else shared_matrix(device, verifier_directory, head, dtype),
        }
        self._view_length = 1

    @property
    def artifact(self) -> DrafterArtifact:
        return self._artifact

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self._device.use()
        if self._cache.allocate(num_slots, moves):
            self._draft.forget_addresses()
            self._context.forget_addresses()
        self._view_length = capacity

    def commit_context(self, context: ContextRows) -> None:
        self._device.use()
        profiles = self._context.profiles
        for piece in pieces(context, most(profiles, "M"), most(profiles, "W")):
            self._commit(ContextRows(context.features[piece], context.positions[piece], context.slots[piece]))

    def draft(self, batch: DraftBatch) -> DraftOutput:
        self._device.use()
        artifact, execution, cache = self._artifact, self._draft, self._cache
        profiles = execution.profiles
        most_each = most(profiles, "W") - artifact.block_size
        if batch.context.num_rows > most(profiles, "M") or rows_per_slot(batch.context.slots) > most_each:
            self.commit_context(batch.context)
            batch = batch.without_context()
        slots = np.concatenate([batch.slots, batch.context.slots])
        end = int(batch.starts.max()) + artifact.block_size
        looked = max(end, min(self._view_length, most(profiles, "C")))
        needed = {
            "M": max(1, batch.context.num_rows),
            "D": len(batch.anchors),
            "R": span(slots),
            "W": rows_per_slot(batch.context.slots) + artifact.block_size,
            "C": looked,
        }
        choice = choose(profiles, needed, {"R": cache.num_slots, "C": looked})
        view = View.over(slots, choice.sizes["R"], cache.num_slots)
        arrays = execution.inputs(choice, skip=(_FEATURES,))
        fill_draft(arrays, batch, view, choice.sizes, cache.capacity)
        self._put_features(execution, batch.context.features)
        bound = cache.addresses(view.first) | {name: memory.address for name, memory in self._shared.items()}
        execution.run(choice, arrays, bound, view.first, capture=choice.index == 0)
        names = ("tokens", "candidates", "probabilities", "confidence_logits")
        count = len(batch.anchors)
        # Small, and worth being the caller's own.
        return DraftOutput(*(array[:count].copy() for array in execution.results(choice, names)))

    def close(self) -> None:
        self._device.use()
        self._draft.close()
        self._context.close()
        self._cache.clear()
        self._shared.clear()

    def _commit(self, context: ContextRows) -> None:
        if not context.num_rows:
            return
        execution, cache = self._context, self._cache
        needed = {"M": context.num_rows, "R": span(context.slots), "W": rows_per_slot(context.slots)}
        choice = choose(execution.profiles, needed, {"R": cache.num_slots})
        view = View.over(context.slots, choice.sizes["R"], cache.num_slots)
        arrays = execution.inputs(choice, skip=(_FEATURES,))
        fill_context(arrays, context, view, choice.sizes, cache.capacity)
        self._put_features(execution, context.features)
        execution.run(choice, arrays, cache.addresses(view.first), view.first, capture=False)

    def _put_features(self, execution: Execution, features: Rows) -> None:
        """From the verifier's memory or from the host, to where the engine reads them."""
        address = execution.device_address(_FEATURES)
        if isinstance(features, DeviceRows):
            features.copy_to(address)
        elif len(features):
            array = np.ascontiguousarray(np.asarray(features), dtype=np.float32)
            self._device.upload(address, array)
            # Pageable memory of the caller, which may be gone before the copy is.
            self._device.synchronize()
