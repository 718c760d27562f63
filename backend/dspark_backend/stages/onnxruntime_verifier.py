"""The verifier on ONNX Runtime: the cache lives in memory of the CPU or of a device that the graph updates in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import VerifierArtifact, load_verifier_artifact
from dspark_backend.stages.batch import BatchLayout, IntArray, RowMove, StepBatch, StepOutput
from dspark_backend.stages.binding import exact_threads, open_session
from dspark_backend.stages.excerpt import Excerpts
from dspark_backend.stages.placement import Placement
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.slot_arrays import SlotArrays, SlotWindow

MODEL_FILE = "model.onnx"


class OnnxRuntimeVerifier:
    """Implements :class:`~dspark_backend.stages.protocol.VerifierStage`.

    Raises:
        ArtifactError: the artifact is missing, corrupt, for another runtime, or ONNX Runtime refuses its graph.
        ConfigError: the provider or the device is not there.
    """

    def __init__(
        self,
        directory: Path,
        threads: int = 0,
        settings: StageSettings | None = None,
        placement: Placement | None = None,
    ) -> None:
        settings = settings or StageSettings(threads)
        self._artifact = load_verifier_artifact(directory)
        if self._artifact.runtime != "onnxruntime":
            raise ArtifactError(
                f"{directory}: expected an artifact for onnxruntime, got one for {self._artifact.runtime}"
            )
        placement = placement or Placement.of(settings)
        threads = exact_threads(settings.threads, self._artifact.cache_shapes)
        session = open_session(directory / MODEL_FILE, threads, None, settings, placement.device)
        self._binding = placement.binding(session)
        # A batched product with a single row takes another kernel, whose sums differ in the last bit.
        self._min_columns = 2 if self._artifact.group == 1 else 1
        self._cache = placement.cache(self._artifact.cache_shapes)
        self._excerpts = Excerpts(self._cache) if isinstance(self._cache, SlotArrays) else None
        self._place: tuple[BatchLayout, SlotWindow, bytes] | None = None
        """Of the step that is bound."""

    @property
    def artifact(self) -> VerifierArtifact:
        return self._artifact

    @property
    def lazy_memory(self) -> bool:
        return isinstance(self._cache, SlotArrays)

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        # Should memory run out, no pointer to a freed cache may stay bound.
        self._unbind()
        self._cache.allocate(num_slots, capacity, moves)

    def copy_rows(self, move: RowMove) -> None:
        self._cache.copy_rows(move)

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self._cache.clear_rows(slot, first)

    def step(self, batch: StepBatch) -> StepOutput:
        excerpt = None if self._excerpts is None else self._excerpts.of(batch)
        if excerpt is None:
            return self._run(batch, self._cache.window(batch.slots.tolist()), batch.slots)
        places = np.arange(len(batch.slots))
        output = self._run(batch, excerpt.cache.window(places.tolist()), places)
        excerpt.put_back()
        return output

    def _run(self, batch: StepBatch, window: SlotWindow, slots: IntArray) -> StepOutput:
        """The step over ``slots`` of a window's cache."""
        binding, tokens, wanted = self._binding, batch.num_tokens, len(batch.logit_rows)
        binding.cache(window)
        binding.input("input_ids", (tokens,))[:] = batch.token_ids
        binding.input("positions", (tokens,))[:] = batch.positions
        place = (batch.layout, window, slots.tobytes())
        if self._place != place:
            self._place = None
            self._fill_place(batch.layout, window, slots)
            self._place = place
        output = StepOutput(
            logits=binding.output_rows("logits", (wanted, self._artifact.vocab_size)),
            argmax=binding.output("argmax", (wanted,), np.int64),
            top_logit=binding.output("top_logit", (wanted,)),
            features=binding.output_rows("features", (tokens, self._artifact.feature_size)),
        )
        binding.run()
        return output

    def _fill_place(self, layout: BatchLayout, window: SlotWindow, slots: IntArray) -> None:
        """Inputs that say where tokens go: the same for as long as the same requests have as many tokens each."""
        binding, tokens = self._binding, len(layout.columns)
        binding.input("columns", (tokens,))[:] = layout.columns
        binding.input("logit_rows", layout.logit_rows.shape)[:] = layout.logit_rows
        rows = binding.input("rows", (tokens,))
        np.subtract(slots[layout.segment_of], window.first, out=rows)
        query_index = binding.input("query_index", (window.count, max(layout.longest, self._min_columns)))
        query_index[:] = 0
        query_index[rows, layout.columns] = np.arange(tokens)

    def close(self) -> None:
        self._unbind()
        self._cache.clear()

    def _unbind(self) -> None:
        """Let go of everything that points to the cache."""
        self._binding.clear()
        self._place = None
        if self._excerpts is not None:
            self._excerpts.clear()
