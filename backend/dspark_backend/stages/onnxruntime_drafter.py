"""The drafter on ONNX Runtime. Embedding and LM head are the verifier's, mapped from its artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark_backend.stages.artifact import DrafterArtifact, check_pair, load_drafter_artifact, load_verifier_artifact
from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.binding import CpuBinding, exact_threads, open_session
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch, DraftOutput
from dspark_backend.stages.placement import Placement
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.shared_weights import shared_weights
from dspark_backend.stages.slot_arrays import SlotArrays, SlotWindow

DRAFT_FILE = "draft.onnx"
CONTEXT_FILE = "context.onnx"


class OnnxRuntimeDrafter:
    """Implements :class:`~dspark_backend.stages.protocol.DrafterStage`.

    Raises:
        ArtifactError: an artifact is missing or corrupt, the drafter is of another verifier, or ONNX Runtime refuses a
            graph.
        ConfigError: the provider or the device is not there.
    """

    def __init__(
        self,
        directory: Path,
        verifier_directory: Path,
        threads: int = 0,
        settings: StageSettings | None = None,
        placement: Placement | None = None,
    ) -> None:
        settings = settings or StageSettings(threads)
        self._artifact = load_drafter_artifact(directory)
        # The verifier's own stage, loaded before or beside this one, reads its files whole.
        verifier = load_verifier_artifact(verifier_directory, check_contents=False)
        check_pair(self._artifact, verifier)
        # Kept for the sessions, which point to them.
        self._shared = shared_weights(self._artifact, directory, verifier, verifier_directory)
        placement = placement or Placement.of(settings)
        shared, device = self._shared, placement.device
        threads = exact_threads(settings.threads, self._artifact.cache_shapes)
        self._draft = placement.binding(open_session(directory / DRAFT_FILE, threads, shared, settings, device))
        self._context = placement.binding(open_session(directory / CONTEXT_FILE, threads, None, settings, device))
        self._place: tuple[SlotWindow, int, bytes] | None = None
        """Where the blocks of the last round were: mostly where those of the next one are."""
        self._cache = placement.cache(self._artifact.cache_shapes)
        # As in the verifier: a batched product with a single row takes another kernel.
        self._min_columns = 2 if self._artifact.group == 1 else 1

    @property
    def artifact(self) -> DrafterArtifact:
        return self._artifact

    @property
    def lazy_memory(self) -> bool:
        return isinstance(self._cache, SlotArrays)

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self._unbind()
        self._cache.allocate(num_slots, capacity, moves)

    def copy_rows(self, move: RowMove) -> None:
        self._cache.copy_rows(move)

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self._cache.clear_rows(slot, first)

    def commit_context(self, context: ContextRows) -> None:
        window = self._cache.window(context.slots.tolist())
        self._context.cache(window)
        _fill_context(self._context, context, window)
        self._context.run()

    def draft(self, batch: DraftBatch) -> DraftOutput:
        artifact, binding, (count, width) = self._artifact, self._draft, batch.uniforms.shape
        # Context of requests that do not draft may be among it.
        window = self._cache.window(batch.slots.tolist() + batch.context.slots.tolist())
        binding.cache(window)
        _fill_context(binding, batch.context, window)
        place = (window, width, batch.slots.tobytes())
        if self._place != place:
            self._place = None
            block_rows = binding.input("block_rows", (count,))
            np.subtract(batch.slots, window.first, out=block_rows)
            query_index = binding.input("query_index", (window.count, max(width, self._min_columns)))
            query_index[:] = 0
            query_index[block_rows, :width] = np.arange(count * width).reshape(count, width)
            self._place = place
        binding.input("anchors", (count,))[:] = batch.anchors
        binding.input("starts", (count,))[:] = batch.starts
        binding.input("uniforms", (count, width), np.float32)[:] = batch.uniforms
        binding.input("temperature", (count,), np.float32)[:] = batch.temperature
        binding.input("top_k", (count,))[:] = batch.top_k
        binding.input("top_p", (count,), np.float32)[:] = batch.top_p
        binding.input("min_p", (count,), np.float32)[:] = batch.min_p
        shape = (count, width)
        tokens = binding.output("tokens", shape, np.int64)
        candidates = binding.output("candidates", (*shape, artifact.num_candidates), np.int64)
        probabilities = binding.output("probabilities", (*shape, artifact.num_candidates))
        confidence = binding.output("confidence_logits", shape)
        binding.run()
        # Small, and worth being the caller's own.
        return DraftOutput(tokens.copy(), candidates.copy(), probabilities.copy(), confidence.copy())

    def close(self) -> None:
        self._unbind()
        self._cache.clear()

    def _unbind(self) -> None:
        """Let go of everything that points to the cache."""
        self._draft.clear()
        self._context.clear()
        self._place = None


def _fill_context(binding: CpuBinding, context: ContextRows, window: SlotWindow) -> None:
    """Inputs that both graphs have."""
    count = context.num_rows
    binding.input_rows("features", context.features)
    binding.input("context_positions", (count,))[:] = context.positions
    np.subtract(context.slots, window.first, out=binding.input("context_rows", (count,)))
