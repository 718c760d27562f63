"""The drafter inside a DeepSeek-V4 checkpoint, with the inputs and outputs of every other drafter's graphs.

Its stages are decoder layers with sliding attention alone, so that verifier and drafter share their parts. What
differs:

- Context rows enter as features: c = RMSNorm(fc(features)), whose latents are projected, normed and rotated as those of
  block rows are. c passes neither hyper-connections nor ``attn_norm``.
- Every slot sees the same: the last ``window`` positions before the anchor, and the whole block, in both directions.
- All streams begin as the token's embedding; the drafter's own ``hc_head`` joins them.
- The LM head reads the joined stream normed, the confidence head the same stream before that norm.

Several public accounts of the checkpoints' own inference code agree on these points; no released checkpoint was run.
What that code does for the sake of its storage (latents rounded to FP8) is not repeated.

Shapes as in ``graph.drafter``; besides, D channels of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD
from dspark_export.deepseek_v4 import DeepSeekV4
from dspark_export.drafter_spec import DrafterSpec
from dspark_export.graph.blocks import Blocks
from dspark_export.graph.deepseek_v4.attention import Caches, Halves, latent_halves
from dspark_export.graph.deepseek_v4.hyper import expand, join
from dspark_export.graph.deepseek_v4.layer import decoder_layer
from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.deepseek_v4.place import Place, place, rope_tables
from dspark_export.graph.deepseek_v4.rotation import rotation
from dspark_export.graph.draft_block import WIDTH, block_inputs, block_tokens
from dspark_export.graph.head import SequentialHead
from dspark_export.graph.linear import FloatLinears
from dspark_export.graph.ort_dialect import OrtDialect
from dspark_export.graph.tape import GraphTape, graph_input, graph_output
from dspark_export.weights import WeightSource

_INT, _FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


@dataclass(frozen=True)
class _Context:
    """Latents of the context rows in every layer, and where they go."""

    halves: list[Halves]
    placement: ir.Value


class DeepSeekDrafterGraph:
    """Builds one of the two graphs. Each instance builds once.

    ``weights`` have the names that :mod:`dspark_export.layouts.deepseek` gives them.
    """

    def __init__(
        self, spec: DrafterSpec, weights: WeightSource, max_context: int, weight_dtype: str = "float32"
    ) -> None:
        assert isinstance(spec.decoder, DeepSeekV4)
        self._spec = spec
        self._decoder = spec.decoder
        self._max_context = max_context
        self._parts = Parts(OrtDialect(GraphTape(weight_dtype)), spec.decoder, weights)
        self._tables = rope_tables(self._parts.tape, (spec.decoder.attention.rope,), max_context)
        self._features = graph_input("features", _FLOAT, ("M", spec.feature_size))
        self._context_positions = graph_input("context_positions", _INT, ("M",))
        self._context_rows = graph_input("context_rows", _INT, ("M",))
        self._cache_shapes = [("S", heads, "C", width) for heads, width in spec.decoder.cache_shapes]
        self._caches = [
            graph_input(f"{kind}_cache_{layer}", _FLOAT, shape)
            for layer, shape in enumerate(self._cache_shapes)
            for kind in ("key", "value")
        ]

    @property
    def _context_inputs(self) -> list[ir.Value]:
        return [self._features, self._context_positions, self._context_rows]

    def build_context(self) -> ir.Model:
        """features -> caches."""
        context, dialect = self._context(), self._parts.dialect
        written = []
        for layer, halves in enumerate(context.halves):
            keys, values = self._caches[2 * layer : 2 * layer + 2]
            after = Caches(
                dialect.write(keys, context.placement, halves.first),
                dialect.write(values, context.placement, halves.second),
            )
            written += self._written(layer, after)
        inputs = [*self._context_inputs, *self._caches]
        return self._parts.tape.model("drafter_context", inputs, written, {"dspark.stage": "drafter"})

    def build_draft(self, expose_intermediates: bool = False) -> ir.Model:
        """One round. ``expose_intermediates`` adds hidden [R, m, H], base_logits and draft_logits [R, m, V]."""
        parts, spec, tape, dialect = self._parts, self._spec, self._parts.tape, self._parts.dialect
        vocab, hidden, block = self._decoder.vocab_size, self._decoder.hidden_size, WIDTH
        anchors = graph_input("anchors", _INT, ("R",))
        block_rows = graph_input("block_rows", _INT, ("R",))
        starts = graph_input("starts", _INT, ("R",))
        query_index = graph_input("query_index", _INT, ("S", "Q"))

        linears = FloatLinears(tape, parts.weights)
        head = SequentialHead(spec, Blocks(dialect, self._decoder, parts.weights, linears), linears)
        width = head.width

        context = self._context()
        where = self._place(width, block_rows, starts, query_index)
        where = replace(where, placement=dialect.join(context.placement, where.placement))
        tokens = block_tokens(tape, spec, anchors, width)
        streams = expand(parts, tape.op("Gather", dialect.shared(SHARED_EMBEDDING, (vocab, hidden)), tokens, axis=0))
        written = []
        for layer, halves in enumerate(context.halves):
            own = Caches(*self._caches[2 * layer : 2 * layer + 2])
            streams, after = decoder_layer(parts, layer, streams, tokens, own, where, halves)
            written += self._written(layer, after)
        joined = join(parts, streams)
        normed = parts.norm(joined, "norm", hidden)
        logits = tape.op("Gemm", normed, dialect.shared(SHARED_HEAD, (vocab, hidden)), transB=1)
        base = tape.reshape(logits, (-1, width, vocab))
        # A vanilla head reads no hidden state, so that this one is the confidence head's.
        stream = tape.reshape(joined, (-1, width, hidden))
        drawn = head.build(anchors, stream, base, with_logits=expose_intermediates)
        outputs = [
            graph_output(drawn.tokens, "tokens", _INT, ("R", block)),
            graph_output(drawn.candidates, "candidates", _INT, ("R", block, head.num_candidates)),
            graph_output(drawn.probabilities, "probabilities", _FLOAT, ("R", block, head.num_candidates)),
            graph_output(drawn.confidence, "confidence_logits", _FLOAT, ("R", block)),
        ]
        if drawn.logits is not None:
            shaped = tape.reshape(normed, (-1, width, hidden))
            outputs += [
                graph_output(shaped, "hidden", _FLOAT, ("R", block, hidden)),
                graph_output(base, "base_logits", _FLOAT, ("R", block, vocab)),
                graph_output(drawn.logits, "draft_logits", _FLOAT, ("R", block, vocab)),
            ]
        inputs = [*self._context_inputs, anchors, block_rows, starts, query_index, *head.inputs, *self._caches]
        return tape.model("drafter", inputs, [*outputs, *written], {"dspark.stage": "drafter"})

    def _context(self) -> _Context:
        parts, decoder = self._parts, self._decoder
        layers, dim, hidden = decoder.num_layers, decoder.attention.head_dim, decoder.hidden_size
        projected = parts.product(self._features, ("fc",), self._spec.feature_size)
        context = parts.norm(projected, "hidden_norm", hidden)
        latents = parts.product(context, [f"layers.{layer}.attn.wkv" for layer in range(layers)], hidden)
        turn = rotation(parts.tape, self._tables[decoder.attention.rope], self._context_positions, (-1, 1))
        rows = parts.split(latents, [dim] * layers)
        return _Context(
            [latent_halves(parts, layer, row, turn) for layer, row in enumerate(rows)],
            parts.dialect.placement(self._context_rows, self._context_positions, 1),
        )

    def _place(self, width: ir.Value, block_rows: ir.Value, starts: ir.Value, query_index: ir.Value) -> Place:
        decoder = self._decoder
        assert decoder.attention.window is not None
        return place(
            self._parts.dialect,
            block_inputs(self._parts.tape, width, block_rows, starts, query_index),
            self._caches[0],
            decoder.attention.window,
            self._tables,
            decoder.attention.rope,
            set(),
            self._max_context,
        )

    def _written(self, layer: int, caches: Caches) -> list[ir.Value]:
        return [
            graph_output(cache, f"{kind}_cache_{layer}_out", _FLOAT, self._cache_shapes[layer])
            for kind, cache in (("key", caches.keys), ("value", caches.values))
        ]
