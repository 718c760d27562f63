"""The verifier on ONNX Runtime, CPU provider: the cache lives in numpy arrays that the graph updates in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import VerifierArtifact, load_verifier_artifact
from dspark_backend.stages.batch import FloatArray, IntArray, RowMove, StepBatch, StepOutput

MODEL_FILE = "model.onnx"

logger = logging.getLogger(__name__)


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
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(directory / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ArtifactError(f"{directory / MODEL_FILE}: ONNX Runtime cannot load the graph: {error}") from error
        self._binding = self._session.io_binding()
        # A batched product with a single row takes another kernel, whose sums differ in the last bit.
        self._min_columns = 2 if self._artifact.group == 1 else 1
        self._caches: list[FloatArray] = []
        self._view: tuple[int, int] | None = None
        self._logits: FloatArray = np.empty((0, self._artifact.vocab_size), dtype=np.float32)

    @property
    def artifact(self) -> VerifierArtifact:
        return self._artifact

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        artifact = self._artifact
        shape = (num_slots, artifact.num_kv_heads, capacity, artifact.head_dim)
        old, self._caches = self._caches, []
        for index in range(2 * artifact.num_layers):
            # Zeros, not empty: a masked position has weight 0, and 0 times a stale NaN would be NaN.
            cache = np.zeros(shape, dtype=np.float32)
            for move in moves:
                cache[move.target, :, : move.length] = old[index][move.source, :, : move.length]
            self._caches.append(cache)
            if old:
                old[index] = cache[:0]
        self._view = None

    def copy_rows(self, move: RowMove) -> None:
        for cache in self._caches:
            cache[move.target, :, : move.length] = cache[move.source, :, : move.length]

    def step(self, batch: StepBatch) -> StepOutput:
        first, last = int(batch.slots.min()), int(batch.slots.max())
        self._bind_caches(first, last - first + 1)
        rows = batch.slots[batch.segment_of] - first
        query_index = np.zeros((last - first + 1, max(int(batch.columns.max()) + 1, self._min_columns)), dtype=np.int64)
        query_index[rows, batch.columns] = np.arange(batch.num_tokens)
        wanted = len(batch.logit_rows)
        if len(self._logits) < wanted:
            self._logits = np.empty((wanted, self._artifact.vocab_size), dtype=np.float32)

        self._bind_input("input_ids", batch.token_ids)
        self._bind_input("positions", batch.positions)
        self._bind_input("rows", rows)
        self._bind_input("columns", batch.columns)
        self._bind_input("query_index", query_index)
        self._bind_input("logit_rows", batch.logit_rows)
        logits = self._logits[:wanted]
        argmax = np.empty(wanted, dtype=np.int64)
        features = np.empty(
            (batch.num_tokens, len(self._artifact.target_layer_ids) * self._artifact.hidden_size), dtype=np.float32
        )
        self._bind_output("logits", logits)
        self._bind_output("argmax", argmax)
        self._bind_output("features", features)
        self._session.run_with_iobinding(self._binding)
        return StepOutput(logits=logits, argmax=argmax, features=features)

    def close(self) -> None:
        self._caches = []
        self._view = None
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()

    def _bind_caches(self, first: int, count: int) -> None:
        """Bind slots first .. first+count-1 of every cache, the same memory as input and as output."""
        if self._view == (first, count):
            return
        for index, cache in enumerate(self._caches):
            name = f"{'value' if index % 2 else 'key'}_cache_{index // 2}"
            window = cache[first : first + count]
            self._bind_input(name, window)
            self._bind_output(f"{name}_out", window)
        self._view = (first, count)

    def _bind_input(self, name: str, array: FloatArray | IntArray) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: FloatArray | IntArray) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
