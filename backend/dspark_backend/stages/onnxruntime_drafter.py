"""The drafter on ONNX Runtime, CPU provider. Embedding and LM head are the verifier's, mapped from its artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import DrafterArtifact, check_pair, load_drafter_artifact, load_verifier_artifact
from dspark_backend.stages.batch import IntArray, RowMove
from dspark_backend.stages.binding import CpuBinding, SlotArrays, open_session
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch, DraftOutput

DRAFT_FILE = "draft.onnx"
CONTEXT_FILE = "context.onnx"
D2T_FILE = "d2t.npy"
SHARED_EMBEDDING = "shared.embedding"
SHARED_HEAD = "shared.head"


class OnnxRuntimeDrafter:
    """Implements :class:`~dspark_backend.stages.protocol.DrafterStage`.

    Raises:
        ArtifactError: an artifact is missing or corrupt, the drafter is of another verifier, or ONNX Runtime refuses a
            graph.
    """

    def __init__(self, directory: Path, verifier_directory: Path, threads: int = 0) -> None:
        self._artifact = load_drafter_artifact(directory)
        # The verifier's own stage, loaded before or beside this one, reads its files whole.
        verifier = load_verifier_artifact(verifier_directory, check_contents=False)
        check_pair(self._artifact, verifier)
        head = verifier.head.read(verifier_directory)
        if self._artifact.draft_vocab_size != self._artifact.vocab_size:
            head = np.ascontiguousarray(head[self._read_d2t(directory)])
        # Kept for the sessions, which point to them.
        self._shared = {SHARED_EMBEDDING: verifier.embedding.read(verifier_directory), SHARED_HEAD: head}
        self._draft = CpuBinding(open_session(directory / DRAFT_FILE, threads, self._shared))
        self._context = CpuBinding(open_session(directory / CONTEXT_FILE, threads))
        self._cache = SlotArrays(self._artifact.num_layers, self._artifact.num_kv_heads, self._artifact.head_dim)
        self._block_steps = np.arange(self._artifact.block_size)

    @property
    def artifact(self) -> DrafterArtifact:
        return self._artifact

    def _read_d2t(self, directory: Path) -> IntArray:
        table = np.load(directory / D2T_FILE)
        size = self._artifact.draft_vocab_size
        inside = table.shape == (size,) and table.min() >= 0 and table.max() < self._artifact.vocab_size
        # A token proposed at two places would count only one share of its probability.
        if not inside or len(np.unique(table)) != size:
            raise ArtifactError(
                f"{directory / D2T_FILE}: expected {size} different token ids below {self._artifact.vocab_size}; "
                "export the drafter again"
            )
        return np.asarray(table, dtype=np.int64)

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        self._draft.clear()
        self._context.clear()
        self._cache.allocate(num_slots, capacity, moves)

    def copy_rows(self, move: RowMove) -> None:
        self._cache.copy_rows(move)

    def clear_rows(self, slot: int) -> None:
        self._cache.clear_rows(slot)

    def commit_context(self, context: ContextRows) -> None:
        first, last = int(context.slots.min()), int(context.slots.max())
        self._context.cache(self._cache, first, last - first + 1)
        rows = context.slots - first
        self._bind_context(self._context, context, rows)
        self._context.run()

    def draft(self, batch: DraftBatch) -> DraftOutput:
        artifact, count = self._artifact, len(batch.anchors)
        slots = np.concatenate([batch.slots, batch.context.slots])
        first, last = int(slots.min()), int(slots.max())
        block_rows = batch.slots - first
        query_index = np.zeros((last - first + 1, artifact.block_size), dtype=np.int64)
        query_index[block_rows] = np.arange(count)[:, None] * artifact.block_size + self._block_steps
        shape = (count, artifact.block_size)
        tokens = np.empty(shape, dtype=np.int64)
        candidates = np.empty((*shape, artifact.num_candidates), dtype=np.int64)
        probabilities = np.empty((*shape, artifact.num_candidates), dtype=np.float32)
        confidence = np.empty(shape, dtype=np.float32)

        binding = self._draft
        binding.cache(self._cache, first, last - first + 1)
        context_rows = batch.context.slots - first
        self._bind_context(binding, batch.context, context_rows)
        binding.input("anchors", batch.anchors)
        binding.input("block_rows", block_rows)
        binding.input("starts", batch.starts)
        binding.input("query_index", query_index)
        binding.input("uniforms", batch.uniforms)
        binding.input("temperature", batch.temperature)
        binding.input("top_k", batch.top_k)
        binding.input("top_p", batch.top_p)
        binding.input("min_p", batch.min_p)
        binding.output("tokens", tokens)
        binding.output("candidates", candidates)
        binding.output("probabilities", probabilities)
        binding.output("confidence_logits", confidence)
        binding.run()
        return DraftOutput(tokens, candidates, probabilities, confidence)

    def close(self) -> None:
        self._draft.clear()
        self._context.clear()
        self._cache.clear()

    @staticmethod
    def _bind_context(binding: CpuBinding, context: ContextRows, rows: IntArray) -> None:
        binding.input("features", context.features)
        binding.input("context_positions", context.positions)
        binding.input("context_rows", rows)
