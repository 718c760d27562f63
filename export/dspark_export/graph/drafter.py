"""The drafter's graphs, in either dialect (DESIGN, "DSpark, in formulas").

``draft`` runs one round: context keys and values of newly committed rows, the block backbone, and the sequential head
with its draws. In ONNX Runtime's dialect a round may have fewer slots than the block: the first ones of a block that
ends early, for the time that those take. ``context`` is its first part alone, for prompts that are still being read.

Context rows and block rows live in one slot cache in position order: the block's keys and values are scattered behind
the context, and the next round's context overwrites them. So the drafter's numbers do not depend on how its context
came in.

Shapes: M context rows, R drafting requests, S cache rows in view, g block size, m slots of this round, K candidates,
V vocabulary (Vd where the drafter's is smaller), F features, r Markov rank; the others as in ``layout``.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD, SHARED_HEAD_SCALES
from dspark_export.drafter_spec import DrafterSpec
from dspark_export.graph.blocks import Blocks, rope_tables
from dspark_export.graph.draft_block import WIDTH, block_inputs, block_tokens
from dspark_export.graph.head import SequentialHead
from dspark_export.graph.layout import RaggedLayout, ragged_layout
from dspark_export.graph.linear import FloatLinears, Int8Linears, Linears
from dspark_export.graph.standard_form import StandardForm, make_dialect
from dspark_export.graph.standard_linear import StandardLinears
from dspark_export.graph.tape import graph_input, graph_output
from dspark_export.quantization.plan import Int8Plan
from dspark_export.weights import WeightSource

_INT, _FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


@dataclass(frozen=True)
class _Context:
    """Keys and values of the context rows of every layer: each [M, Hkv, D], and where they go."""

    keys: list[ir.Value]
    values: list[ir.Value]
    index: ir.Value


class DrafterGraph:
    """Builds one of the two graphs. Each instance builds once."""

    def __init__(
        self,
        spec: DrafterSpec,
        weights: WeightSource,
        max_context: int,
        weight_dtype: str = "float32",
        plan: Int8Plan | None = None,
        standard: StandardForm | None = None,
    ) -> None:
        """With a ``plan`` the products are int8, the LM head included, and the rest is float32; ``standard`` asks for
        the standard dialect."""
        self._spec = spec
        self._weights = weights
        self._plan = plan
        self._standard_index = graph_input("update_index", _INT, ("R", "W"))
        self._dialect = make_dialect(weight_dtype, standard, self._standard_index)
        self._tape = self._dialect.tape
        self._standard = standard
        requests, slots = ("R", "S") if standard is None else ("D", "R")
        self._requests, self._slots = requests, slots
        attention = spec.decoder.attention
        self._cache_shape = (slots, attention.num_kv_heads, self._dialect.cache_length, attention.head_dim)
        self._rotation = rope_tables(self._tape, attention.rope, max_context)
        self._features = graph_input("features", _FLOAT, ("M", spec.feature_size))
        self._context_positions = graph_input("context_positions", _INT, ("M",))
        self._context_rows = graph_input("context_rows", _INT, ("M",))
        self._caches = [
            graph_input(f"{kind}_cache_{layer}", self._tape.compute, self._cache_shape)
            for layer in range(spec.decoder.num_layers)
            for kind in ("key", "value")
        ]

    def _linears(self, rows: ir.Value) -> Linears:
        if self._standard is not None:
            return self._standard.linears(self._dialect, self._weights)
        if self._plan is not None:
            return Int8Linears(self._tape, self._weights, self._plan, rows)
        return FloatLinears(self._tape, self._weights)

    def _small_linears(self) -> Linears:
        """Of the sequential head's small products, which stay in the compute dtype."""
        if self._standard is not None:
            return StandardLinears(self._dialect, self._weights)
        return FloatLinears(self._tape, self._weights)

    def _blocks(self, linears: Linears) -> Blocks:
        return Blocks(self._dialect, self._spec.decoder, self._weights, linears)

    @property
    def _context_inputs(self) -> list[ir.Value]:
        given = [self._features, self._context_positions]
        if self._standard is not None:
            return [*given, self._standard_index]
        return [*given, self._context_rows]

    def build_context(self) -> ir.Model:
        """features -> caches."""
        context = self._context()
        written: list[ir.Value] = []
        for layer in range(self._spec.decoder.num_layers):
            written += self._write(layer, context.index, context.keys[layer], context.values[layer])
        return self._tape.model(
            "drafter_context",
            [*self._context_inputs, *self._dialect.inputs, *self._caches],
            written,
            {"dspark.stage": "drafter"},
        )

    def build_draft(self, expose_intermediates: bool = False) -> ir.Model:
        """One round. ``expose_intermediates`` adds hidden [R, m, H], base_logits and draft_logits [R, m, Vd]."""
        spec, tape, static = self._spec, self._tape, self._standard is not None
        decoder, block = spec.decoder, spec.block_size if static else WIDTH
        requests, slots = self._requests, self._slots
        anchors = graph_input("anchors", _INT, (requests,))
        block_rows = graph_input("block_rows", _INT, (requests,))
        starts = graph_input("starts", _INT, (requests,))
        query_index = graph_input("query_index", _INT, (slots, spec.block_size if static else "Q"))

        head = SequentialHead(spec, self._blocks(self._small_linears()), self._linears(anchors), requests, static)
        slots_each = spec.block_size if static else head.width

        context = self._context()
        layouts = self._layouts(head.width, block_rows, starts, query_index)
        linears = self._linears(layouts[0].position_ids)
        blocks = self._blocks(linears)
        index = self._dialect.join(context.index, layouts[0].placement)
        embedding = self._dialect.shared(SHARED_EMBEDDING, (decoder.vocab_size, decoder.hidden_size))
        residual = blocks.embed(embedding, block_tokens(tape, spec, anchors, head.width))  # [R*m, H]
        normed = blocks.norm(residual, "layers.0.input_layernorm.weight")
        written = []
        for layer, layout in enumerate(layouts):
            prefix = f"layers.{layer}"
            query, key, value = self._project(blocks, prefix, normed, layout)
            keys, values = self._write(
                layer,
                index,
                tape.op("Concat", context.keys[layer], key, axis=0),
                tape.op("Concat", context.values[layer], value, axis=0),
            )
            written += [keys, values]
            attended = blocks.attend(decoder.attention, query, keys, values, layout)
            mixed = blocks.output(prefix, decoder.attention, attended)
            normed, residual = blocks.after_attention(prefix, mixed, residual)
            last = layer == decoder.num_layers - 1
            following = "norm.weight" if last else f"layers.{layer + 1}.input_layernorm.weight"
            normed, residual = blocks.after_mlp(prefix, blocks.mlp(prefix, normed), residual, following)

        base = tape.reshape(blocks.cap(self._base_logits(normed, linears)), (-1, slots_each, spec.draft_vocab_size))
        hidden = tape.reshape(normed, (-1, slots_each, decoder.hidden_size))
        drawn = head.build(anchors, hidden, base, with_logits=expose_intermediates)
        outputs = [
            graph_output(drawn.tokens, "tokens", _INT, (requests, block)),
            graph_output(drawn.candidates, "candidates", _INT, (requests, block, head.num_candidates)),
            graph_output(drawn.probabilities, "probabilities", _FLOAT, (requests, block, head.num_candidates)),
            graph_output(drawn.confidence, "confidence_logits", _FLOAT, (requests, block)),
        ]
        if drawn.logits is not None:
            outputs += [
                graph_output(tape.to_float(hidden), "hidden", _FLOAT, (requests, block, decoder.hidden_size)),
                graph_output(tape.to_float(base), "base_logits", _FLOAT, (requests, block, spec.draft_vocab_size)),
                graph_output(drawn.logits, "draft_logits", _FLOAT, (requests, block, spec.draft_vocab_size)),
            ]
        given = [
            *self._context_inputs, anchors, block_rows, starts, query_index, *head.inputs, *self._dialect.inputs,
            *self._caches,
        ]  # fmt: skip
        return tape.model("drafter", given, [*outputs, *written], {"dspark.stage": "drafter"})

    def _base_logits(self, normed: ir.Value, linears: Linears) -> ir.Value:
        """U, [R*m, Vd], by the target's LM head."""
        tape, vocab, hidden = self._tape, self._spec.draft_vocab_size, self._spec.decoder.hidden_size
        if isinstance(linears, Int8Linears):
            weight = tape.shared(SHARED_HEAD, (hidden, vocab), ir.DataType.INT8)
            return linears.shared_head(normed, weight, tape.shared(SHARED_HEAD_SCALES, (vocab,)))
        logits: ir.Value = tape.op("Gemm", normed, self._dialect.shared(SHARED_HEAD, (vocab, hidden)), transB=1)
        return logits

    def _context(self) -> _Context:
        """c = RMSNorm(fc(features)); keys and values of all layers in one product. c passes no input_layernorm."""
        spec, tape = self._spec, self._tape
        blocks = self._blocks(self._linears(self._context_positions))
        decoder, attention = spec.decoder, spec.decoder.attention
        layers, kv_heads, dim = decoder.num_layers, attention.num_kv_heads, attention.head_dim
        projected = blocks.linears.apply(tape.to_compute(self._features), ("fc",), spec.feature_size, bias=False)
        context = blocks.norm(projected, "hidden_norm.weight")
        kinds = ("k",) if attention.keys_are_values else ("k", "v")
        names = [f"layers.{layer}.self_attn.{kind}_proj" for kind in kinds for layer in range(layers)]
        key = value = blocks.linears.apply(context, tuple(names), decoder.hidden_size, attention.qkv_bias)
        if not attention.keys_are_values:
            key, value = tape.op("Split", key, outputs=2, axis=1, num_outputs=2)
        if attention.qk_norm:
            norms = tuple(f"layers.{layer}.self_attn.k_norm.weight" for layer in range(layers))
            key = blocks.head_norm(key, dim, norms, (kv_heads,) * layers)
        if attention.value_norm:
            value = blocks.value_norm(value, layers * kv_heads, dim)
        positions = tape.op("Unsqueeze", self._context_positions, tape.constant([1]))
        key = blocks.rotate(key, layers * kv_heads * dim, positions, self._rotation)
        return _Context(
            keys=self._by_layer(tape.reshape(key, (-1, layers * kv_heads, dim))),
            values=self._by_layer(tape.reshape(value, (-1, layers * kv_heads, dim))),
            index=self._dialect.placement(self._context_rows, self._context_positions, kv_heads),
        )

    def _by_layer(self, rows: ir.Value) -> list[ir.Value]:
        layers = self._spec.decoder.num_layers
        if layers == 1:
            return [rows]
        return list(self._tape.op("Split", rows, outputs=layers, axis=1, num_outputs=layers))

    def _write(self, layer: int, index: ir.Value, key: ir.Value, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Scatter rows into a layer's two caches."""
        written = []
        for offset, (kind, rows) in enumerate((("key", key), ("value", value))):
            cache = self._dialect.write(self._caches[2 * layer + offset], index, rows)
            written.append(graph_output(cache, f"{kind}_cache_{layer}_out", self._tape.compute, self._cache_shape))
        return written[0], written[1]

    def _layouts(
        self, width: ir.Value, block_rows: ir.Value, starts: ir.Value, query_index: ir.Value
    ) -> list[RaggedLayout]:
        """Where the block is and what it sees, of every layer; layers with the same window share one."""
        spec, made = self._spec, dict[int | None, RaggedLayout]()
        for attention in spec.decoder.layer_attentions:
            if attention.window not in made:
                causal = spec.causal_windows and attention.window is not None
                inputs = block_inputs(self._tape, width, block_rows, starts, query_index, causal)
                made[attention.window] = ragged_layout(self._dialect, inputs, attention, self._caches[0])
        return [made[attention.window] for attention in spec.decoder.layer_attentions]

    def _project(
        self, blocks: Blocks, prefix: str, normed: ir.Value, layout: RaggedLayout
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries [S, Hkv, G*Q, D], keys and values [R*m, Hkv, D] of the block rows."""
        tape, attention = self._tape, self._spec.decoder.attention
        joined, value = blocks.query_key_value(prefix, attention, normed)
        width = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        rotated = blocks.rotate(joined, width, layout.position_ids, self._rotation)
        head_rows = tape.reshape(rotated, (-1, attention.head_dim))
        return (
            tape.op("Gather", head_rows, layout.query_rows, axis=0),
            tape.op("Gather", head_rows, layout.key_rows, axis=0),
            tape.reshape(value, (-1, attention.num_kv_heads, attention.head_dim)),
        )
