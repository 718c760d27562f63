"""Graphs for TensorRT, written beside what their engines share: token embedding and LM head as raw matrices.

Weights stream: each is read, brought to its form and written before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dspark_backend.stages.artifact import TensorLocation
from dspark_backend.stages.engine_contract import COMPUTE_DTYPES, Workload
from dspark_backend.stages.engine_info import EngineInfo
from dspark_export.decoder import Decoder
from dspark_export.drafter_spec import DrafterSpec
from dspark_export.errors import ExportError
from dspark_export.graph.drafter import DrafterGraph
from dspark_export.graph.sampler import sampler_graph
from dspark_export.graph.standard_form import StandardForm
from dspark_export.graph.standard_linear import Products
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import EMBEDDING, HEAD, VerifierGraph
from dspark_export.quantization.fp8 import norm_scale, norm_scales
from dspark_export.quantization.int4_weights import Int4Weights
from dspark_export.quantization.plan import fused_name
from dspark_export.weights import WeightSource

RUNTIME = "tensorrt"
TENSORRT_DTYPES = ("float16", "bfloat16", "fp8", "int4")
VERIFIER_GRAPH = "verifier.onnx"
DRAFT_GRAPH = "draft.onnx"
CONTEXT_GRAPH = "context.onnx"
SAMPLER_GRAPH = "sampler.onnx"
SHARED_FILE = "shared.bin"
_LONGEST_BLOCK = 16
"""Drafts a round that a verifier's caches have room for; its drafter is not known yet."""

_PRODUCTS: dict[str, Products] = {"fp8": "fp8", "int4": "int4"}


def check_tensorrt_dtype(dtype: str) -> None:
    """Raises ExportError for a dtype that has no graph for TensorRT."""
    if dtype not in TENSORRT_DTYPES:
        raise ExportError(
            f"--dtype with --runtime tensorrt: expected one of {', '.join(TENSORRT_DTYPES)}, got {dtype!r}"
        )


def write_verifier_graph(
    decoder: Decoder,
    weights: WeightSource,
    taps: tuple[int, ...],
    max_context: int,
    dtype: str,
    directory: Path,
    progress: Callable[[float], None],
    rounded: Int4Weights | None = None,
) -> tuple[TensorLocation, TensorLocation, EngineInfo]:
    """Write graphs and shared matrices; ``rounded``: for int4, products that a calibration pass rounded. Returns where
    embedding and head are, and what an engine has to know."""
    work = Workload(max_context, block_size=_LONGEST_BLOCK)
    scales = norm_scales(decoder, weights, "model.layers.") if dtype == "fp8" else {}
    form = StandardForm(work.capacity, _PRODUCTS.get(dtype, "plain"), scales, rounded)
    compute = COMPUTE_DTYPES[dtype]
    model = VerifierGraph(decoder, weights, taps, max_context, compute, standard=form).build()
    save_graph(_only_standard(model), directory, VERIFIER_GRAPH, progress)
    save_graph(_only_standard(sampler_graph(decoder.vocab_size)), directory, SAMPLER_GRAPH)
    names = [EMBEDDING] if decoder.tied_embedding else [EMBEDDING, HEAD]
    places = _write_shared(weights, [f"{name}.weight" for name in names], compute, directory / SHARED_FILE)
    return places[0], places[-1], EngineInfo(work.capacity, work.padding)


def write_drafter_graphs(
    spec: DrafterSpec,
    weights: WeightSource,
    max_context: int,
    dtype: str,
    directory: Path,
    progress: Callable[[float], None],
) -> EngineInfo:
    """Write both graphs. Embedding and head come from the verifier's artifact."""
    work, decoder = Workload(max_context, block_size=spec.block_size), spec.decoder
    scales: dict[str, float] = {}
    if dtype == "fp8":
        kinds = ("k",) if decoder.attention.keys_are_values else ("k", "v")
        layers = range(decoder.num_layers)
        context = fused_name(tuple(f"layers.{layer}.self_attn.{kind}_proj" for kind in kinds for layer in layers))
        scales = norm_scales(decoder, weights, "layers.")
        scales[context] = norm_scale(weights, "hidden_norm.weight", decoder.norm_offset)
    form = StandardForm(work.capacity, _PRODUCTS.get(dtype, "plain"), scales)
    compute, positions = COMPUTE_DTYPES[dtype], max_context + spec.block_size
    draft = DrafterGraph(spec, weights, positions, compute, standard=form).build_draft()
    save_graph(_only_standard(draft), directory, DRAFT_GRAPH, progress)
    context_graph = DrafterGraph(spec, weights, positions, compute, standard=form).build_context()
    save_graph(_only_standard(context_graph), directory, CONTEXT_GRAPH)
    return EngineInfo(work.capacity, work.padding)


def _only_standard(model: ir.Model) -> ir.Model:
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph if node.domain})
    if foreign:
        raise ExportError(f"the graph for TensorRT uses {', '.join(foreign)}, which no other runtime has")
    return model


def _write_shared(weights: WeightSource, names: list[str], dtype: str, path: Path) -> list[TensorLocation]:
    kind = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    places = []
    with path.open("wb") as stream:
        for name in names:
            array = np.ascontiguousarray(weights.read(name), dtype=kind)
            places.append(TensorLocation(path.name, stream.tell(), array.shape, dtype))
            array.tofile(stream)
    return places
