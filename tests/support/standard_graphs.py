"""Graphs of the standard dialect, fed as ``engine_contract`` says: by ONNX Runtime or by ONNX's own reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from artifacts import GOLDEN, golden_taps
from onnx.reference import ReferenceEvaluator

from dspark_backend.stages.engine_contract import CacheShape, DrafterTensors, VerifierTensors
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD
from dspark_export.families import describe
from dspark_export.graph.drafter import DrafterGraph
from dspark_export.graph.standard_form import StandardForm
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.layouts import read_drafter
from dspark_export.quantization.fp8 import norm_scale, norm_scales
from dspark_export.weights.safetensors_folder import SafetensorsFolder

CAPACITY = 160


def open_graph(model, directory, name):
    save_graph(model, directory, name)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # that caches are copied
    # Else products with int4 weights round their inputs to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(directory / name), options, providers=["CPUExecutionProvider"])


class ReferenceSession:
    """A graph as the ONNX package evaluates it, in numpy; a session as far as :class:`Caches` wants one."""

    def __init__(self, model):
        proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
        self._evaluator = ReferenceEvaluator(proto)
        self._inputs, self._outputs = (
            [_described(value) for value in values] for values in (proto.graph.input, proto.graph.output)
        )

    def get_inputs(self):
        return self._inputs

    def get_outputs(self):
        return self._outputs

    def run(self, names, feed):
        return self._evaluator.run(names, feed)


def _described(value):
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return SimpleNamespace(name=value.name, shape=shape, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))


def target_of(name):
    weights = SafetensorsFolder(GOLDEN / name / "target")
    decoder = describe(weights.config)
    embedding = weights.read("model.embed_tokens.weight")
    head = embedding if decoder.tied_embedding else weights.read("lm_head.weight")
    return weights, decoder, {SHARED_EMBEDDING: embedding, SHARED_HEAD: head}


def verifier_graph(name, dtype="float32", **form):
    weights, decoder, _ = target_of(name)
    return VerifierGraph(
        decoder, weights, golden_taps(name), 128, dtype, standard=StandardForm(CAPACITY, **form)
    ).build()


def drafter_graphs(name, dtype="float32", expose=True, spec=None, **form):
    """(draft, context); ``spec``: in place of the golden drafter's own."""
    own, weights = read_drafter(SafetensorsFolder(GOLDEN / name / "drafter"))
    spec = spec or own
    standard = StandardForm(CAPACITY, **form)
    return (
        DrafterGraph(spec, weights, 140, dtype, standard=standard).build_draft(expose),
        DrafterGraph(spec, weights, 140, dtype, standard=standard).build_context(),
    )


def fp8_scales(name, part):
    """Of what the products of golden target or drafter read, as an export gives them."""
    weights = SafetensorsFolder(GOLDEN / name / part)
    decoder = describe(weights.config)
    scales = norm_scales(decoder, weights, "model.layers." if part == "target" else "layers.")
    if part == "drafter":
        names = [f"layers.{layer}.self_attn.{kind}_proj" for kind in "kv" for layer in range(decoder.num_layers)]
        scales["+".join(names)] = norm_scale(weights, "hidden_norm.weight")
    return scales


def verifier_tensors(name, compute="float32"):
    _, decoder, _ = target_of(name)
    caches = [CacheShape(*shape) for shape in decoder.cache_shapes]
    return VerifierTensors(
        compute, decoder.vocab_size, decoder.hidden_size, len(golden_taps(name)), CAPACITY, caches
    )  # fmt: skip


def drafter_tensors(name, compute="float32"):
    spec, _ = read_drafter(SafetensorsFolder(GOLDEN / name / "drafter"))
    decoder = spec.decoder
    return DrafterTensors(
        compute, decoder.vocab_size, spec.draft_vocab_size, decoder.hidden_size, len(spec.target_layer_ids), CAPACITY,
        [CacheShape(*shape) for shape in decoder.cache_shapes], spec.block_size, min(64, spec.draft_vocab_size),
    )  # fmt: skip


class Caches:
    """Slot caches of a session, threaded from run to run."""

    def __init__(self, session, slots):
        self.session = session
        self.arrays = {
            value.name: np.zeros((slots, *value.shape[1:]), dtype=getattr(value, "dtype", np.float32))
            for value in session.get_inputs()
            if value.name.startswith(("key_cache_", "value_cache_"))
        }

    def run(self, feed, session=None):
        """Outputs by name; the caches take what was written."""
        session = session or self.session
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, feed | self.arrays), strict=True))
        self.arrays = {name: found.pop(f"{name}_out") for name in self.arrays}
        return found


def verify(caches, shared, segments, view):
    """One step over segments (row, start, tokens), logits of all tokens wanted."""
    slots = len(next(iter(caches.arrays.values())))
    width = max(len(tokens) for _, _, tokens in segments)
    index = np.zeros((slots, width), dtype=np.int64)
    starts = np.full(slots, CAPACITY - width, dtype=np.int64)
    ids, positions, rows, columns = [], [], [], []
    for row, start, tokens in segments:
        index[row, : len(tokens)] = len(ids) + np.arange(len(tokens))
        starts[row] = start
        ids += tokens
        positions += range(start, start + len(tokens))
        rows += [row] * len(tokens)
        columns += range(len(tokens))
    flat = {"input_ids": ids, "positions": positions, "rows": rows, "columns": columns, "logit_rows": range(len(ids))}
    feed = {name: np.asarray(value, dtype=np.int64) for name, value in flat.items()}
    places = {"query_index": index, "write_starts": starts, "key_positions": np.arange(view)}
    return caches.run(feed | places | shared)


def draft(caches, shared, features, first, start, anchor, row, block, top_k=1):
    """One greedy round of one request: context rows first .. start-1, then a block."""
    slots = len(next(iter(caches.arrays.values())))
    count = start - first
    update = np.zeros((slots, count + block), dtype=np.int64)
    update[row] = np.arange(count + block)
    starts = np.full(slots, CAPACITY - count - block, dtype=np.int64)
    starts[row] = first
    query = np.zeros((slots, block), dtype=np.int64)
    query[row] = np.arange(block)
    one = np.ones(1, dtype=np.float32)
    return caches.run(
        {
            "features": features[first:start], "context_positions": np.arange(first, start), "update_index": update,
            "write_starts": starts, "anchors": np.array([anchor]), "block_rows": np.array([row]),
            "starts": np.array([start]), "query_index": query, "key_positions": np.arange(start + block),
            "uniforms": np.full((1, block), 0.5, dtype=np.float32), "temperature": one, "top_k": np.array([top_k]),
            "top_p": one, "min_p": 0 * one, **shared,
        }
    )  # fmt: skip
