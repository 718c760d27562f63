"""Export of a drafter: a released checkpoint and the verifier it belongs to -> two graphs and stage.json."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.calibration import CALIBRATION_FILE
from dspark_backend.stages.artifact import (
    DrafterArtifact,
    VerifierArtifact,
    load_verifier_artifact,
    mismatch,
    save_artifact,
)
from dspark_backend.stages.onnxruntime_drafter import CONTEXT_FILE, DRAFT_FILE
from dspark_backend.stages.shared_weights import D2T_FILE
from dspark_export.check import check_drafter
from dspark_export.deepseek_v4 import DeepSeekV4
from dspark_export.drafter_spec import DrafterSpec
from dspark_export.errors import ExportError
from dspark_export.graph.deepseek_v4.drafter import DeepSeekDrafterGraph
from dspark_export.graph.drafter import DrafterGraph
from dspark_export.graph.head import MAX_CANDIDATES
from dspark_export.graph.tape import save_graph
from dspark_export.layer_tensors import layer_shapes, unread
from dspark_export.layouts import read_drafter
from dspark_export.publish import Progress, file_digests, file_sizes, published, tool_versions
from dspark_export.quantization.plan import Int8Plan, LinearPlan
from dspark_export.same_target import check_same_target
from dspark_export.source import source_hash
from dspark_export.tensorrt_graphs import RUNTIME as TENSORRT
from dspark_export.tensorrt_graphs import write_drafter_graphs
from dspark_export.verifier import check_deepseek, check_precision
from dspark_export.weights import WeightSource, require_unquantised
from dspark_export.weights.finite import FiniteWeights
from dspark_export.weights.safetensors_folder import SafetensorsFolder

INT8_PLAN = Int8Plan({"fc": LinearPlan(two_digits=True)})
"""A target's features have channels far larger than the rest; all else of a drafter is even. Draft tokens depend on the
precision, the output does not."""


@dataclass(frozen=True)
class DrafterExport:
    """What to export, for which verifier. Raises ExportError for an unknown dtype."""

    checkpoint: Path
    verifier: Path
    out: Path
    dtype: str = "float32"
    runtime: str = "onnxruntime"

    def __post_init__(self) -> None:
        check_precision(self.runtime, self.dtype)


def export_drafter(options: DrafterExport, progress: Progress, expose_intermediates: bool = False) -> DrafterArtifact:
    """Write the artifact into ``options.out``; nothing changes there unless everything succeeded.

    ``expose_intermediates`` adds the graph's inner values as outputs, for comparison with a reference.

    Raises:
        ExportError: the checkpoint is incomplete, of a kind we cannot build, or of another target.
        ArtifactError: the verifier's artifact is missing or corrupt.
    """
    if options.out.resolve() == options.verifier.resolve():
        raise ExportError(
            f"--out {options.out}: expected a directory of its own, got the verifier's, which the drafter would replace"
        )
    verifier = load_verifier_artifact(options.verifier)
    spec, weights = read_drafter(SafetensorsFolder(options.checkpoint))
    require_unquantised(weights.config, f"drafter {options.checkpoint.name}")
    check_against_verifier(spec, weights, verifier, options.checkpoint.name)
    if verifier.runtime != options.runtime:
        raise ExportError(
            f"{options.verifier}: expected a verifier exported for {options.runtime}, as --runtime says, got one for "
            f"{verifier.runtime}"
        )
    check_same_target(weights, verifier, options.verifier, options.checkpoint.name)
    weights = FiniteWeights(weights, options.dtype)
    if isinstance(spec.decoder, DeepSeekV4):
        check_deepseek(options.runtime, options.dtype)
    with published(options.out) as work:
        # A block reaches past the anchor's position, which may be the context's last.
        positions = verifier.max_context + spec.block_size
        engine = None
        if options.runtime == TENSORRT:
            engine = write_drafter_graphs(
                spec, weights, verifier.max_context, options.dtype, work,
                lambda done: progress("write the drafter", done),
            )  # fmt: skip
        else:
            draft = _graph(spec, weights, positions, options.dtype).build_draft(expose_intermediates)
            save_graph(draft, work, DRAFT_FILE, lambda done: progress("write the drafter", done))
            save_graph(_graph(spec, weights, positions, options.dtype).build_context(), work, CONTEXT_FILE)
        if spec.draft_vocab_size != spec.decoder.vocab_size:
            np.save(work / D2T_FILE, weights.read("d2t").astype(np.int64))
        attention = spec.decoder.attention
        artifact = DrafterArtifact(
            architecture=str((weights.config.get("architectures") or ["DSparkSpeculator"])[0]),
            runtime=options.runtime,
            dtype=options.dtype,
            block_size=spec.block_size,
            vocab_size=spec.decoder.vocab_size,
            draft_vocab_size=spec.draft_vocab_size,
            num_candidates=min(MAX_CANDIDATES, spec.draft_vocab_size),
            hidden_size=spec.decoder.hidden_size,
            num_layers=spec.decoder.num_layers,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            max_context=verifier.max_context,
            target_layer_ids=spec.target_layer_ids,
            markov_head=spec.head,
            has_confidence=spec.confidence,
            variable_width=engine is None,
            verifier_hash=verifier.source_hash,
            source=options.checkpoint.name,
            source_hash=source_hash(weights.files),
            tool_versions=tool_versions(),
            files=file_sizes(work),
            digests=file_digests(work),
            layer_caches=spec.decoder.cache_shapes,
            engine=engine,
        )
        save_artifact(artifact, work)
        progress("check the written graphs", 0.0)
        if engine is None:
            check_drafter(work, options.verifier)
        # Fitted to this very checkpoint; no part of the artifact, since it may be fitted again.
        if (options.checkpoint / CALIBRATION_FILE).is_file():
            shutil.copy2(options.checkpoint / CALIBRATION_FILE, work / CALIBRATION_FILE)
    return artifact


def _graph(
    spec: DrafterSpec, weights: WeightSource, positions: int, dtype: str
) -> DrafterGraph | DeepSeekDrafterGraph:  # fmt: skip
    """What builds one graph for the CPU runtime."""
    if isinstance(spec.decoder, DeepSeekV4):
        return DeepSeekDrafterGraph(spec, weights, positions, dtype)
    stored, plan = ("float32", INT8_PLAN) if dtype == "int8" else (dtype, None)
    return DrafterGraph(spec, weights, positions, stored, plan)


def check_against_verifier(spec: DrafterSpec, weights: WeightSource, verifier: VerifierArtifact, name: str) -> None:
    """Make sure that a checkpoint is whole and belongs to the verifier.

    Raises:
        ExportError: a tensor is missing, has another shape or is not read, or vocabulary, hidden size or taps differ;
            both sides are named.
    """
    decoder = spec.decoder
    reason = mismatch(name, decoder.vocab_size, decoder.hidden_size, spec.target_layer_ids, verifier)
    if reason is not None:
        raise ExportError(reason)
    if isinstance(decoder, DeepSeekV4):
        return  # its layout checks tensors by the names they have there
    expected = _expected_shapes(spec)
    for tensor, shape in expected.items():
        if weights.shape(tensor) != shape:
            raise ExportError(f"drafter {name}: expected {tensor} of shape {shape}, got {weights.shape(tensor)}")
    unknown = unread(weights, expected, ("layers.", "markov_head."))
    if unknown:
        raise ExportError(
            f"drafter {name}: expected the tensors of {decoder.num_layers} layers and a {spec.head} head, as "
            f"config.json says, got {unknown} as well; the files do not belong together"
        )
    if "d2t" in expected:
        _check_token_table(weights.read("d2t"), decoder.vocab_size, name)


def _check_token_table(ids: NDArray[Any], vocab_size: int, name: str) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) != len(ids):
        raise ExportError(
            f"drafter {name}: d2t: expected {len(ids)} different token ids below {vocab_size}, got ids from "
            f"{ids.min()} to {ids.max()}, {len(np.unique(ids))} of them different"
        )


def _expected_shapes(spec: DrafterSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the graphs read, with its shape. Embedding and LM head come from the verifier."""
    decoder, hidden, rank = spec.decoder, spec.decoder.hidden_size, spec.markov_rank
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, spec.feature_size),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "markov_head.markov_w1.weight": (decoder.vocab_size, rank),
        "markov_head.markov_w2.weight": (spec.draft_vocab_size, rank),
    }
    for layer in range(decoder.num_layers):
        shapes |= layer_shapes(decoder, layer, f"layers.{layer}")
    if spec.head == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, hidden + rank), "markov_head.gate_proj.bias": (rank,)}
    if spec.head == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, hidden + 2 * rank)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if spec.confidence:
        shapes["confidence_head.proj.weight"] = (1, hidden + (rank if spec.confidence_with_markov else 0))
    if spec.draft_vocab_size != decoder.vocab_size:
        shapes["d2t"] = (spec.draft_vocab_size,)
    return shapes
