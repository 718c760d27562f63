"""The verifier on ONNX Runtime, CPU provider: the cache lives in numpy arrays that the graph updates in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import VerifierArtifact, load_verifier_artifact
from dspark_backend.stages.batch import FloatArray, RowMove, StepBatch, StepOutput
from dspark_backend.stages.binding import CpuBinding, SlotArrays, open_session

MODEL_FILE = "model.onnx"


class OnnxRuntimeVerifier:
    """Implements :class:`~dspark_backend.stages.protocol.VerifierStage`.

    Raises:
        ArtifactError: the artifact is missing, corrupt, for another runtime, or ONNX Runtime refuses its graph.
    """

    def __init__(self, directory: Path, threads: int = 0) -> None:
        self._artifact = load_verifier_artifact(directory)
        if self._artifact.runtime != "onnxruntime":
            raise ArtifactError(
                f"{directory}: expected an artifact for onnxruntime, got one for {self._artifact.runtime}"
            )
        self._binding = CpuBinding(open_session(directory / MODEL_FILE, threads))
        # A batched product with a single row takes another kernel, whose sums differ in the last bit.
        self._min_columns = 2 if self._artifact.group == 1 else 1
        self._cache = SlotArrays(self._artifact.num_layers, self._artifact.num_kv_heads, self._artifact.head_dim)
        self._logits: FloatArray = np.empty((0, self._artifact.vocab_size), dtype=np.float32)

    @property
    def artifact(self) -> VerifierArtifact:
        return self._artifact

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        # Should memory run out, no pointer to a freed cache may stay bound.
        self._binding.clear()
        self._cache.allocate(num_slots, capacity, moves)

    def copy_rows(self, move: RowMove) -> None:
        self._cache.copy_rows(move)

    def clear_rows(self, slot: int) -> None:
        self._cache.clear_rows(slot)

    def step(self, batch: StepBatch) -> StepOutput:
        first, last = int(batch.slots.min()), int(batch.slots.max())
        rows = batch.slots[batch.segment_of] - first
        query_index = np.zeros((last - first + 1, max(int(batch.columns.max()) + 1, self._min_columns)), dtype=np.int64)
        query_index[rows, batch.columns] = np.arange(batch.num_tokens)
        wanted = len(batch.logit_rows)
        if len(self._logits) < wanted:
            self._logits = np.empty((wanted, self._artifact.vocab_size), dtype=np.float32)
        logits = self._logits[:wanted]
        argmax = np.empty(wanted, dtype=np.int64)
        features = np.empty(
            (batch.num_tokens, len(self._artifact.target_layer_ids) * self._artifact.hidden_size), dtype=np.float32
        )

        binding = self._binding
        binding.cache(self._cache, first, last - first + 1)
        binding.input("input_ids", batch.token_ids)
        binding.input("positions", batch.positions)
        binding.input("rows", rows)
        binding.input("columns", batch.columns)
        binding.input("query_index", query_index)
        binding.input("logit_rows", batch.logit_rows)
        binding.output("logits", logits)
        binding.output("argmax", argmax)
        binding.output("features", features)
        binding.run()
        return StepOutput(logits=logits, argmax=argmax, features=features)

    def close(self) -> None:
        self._binding.clear()
        self._cache.clear()
