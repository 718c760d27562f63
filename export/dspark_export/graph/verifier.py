"""The verifier's graph: ragged batch, slot cache written in place; in either dialect.

Every choice here serves one property: the logits of a position do not depend, bit for bit, on how its tokens were
batched, chunked or drafted. Linear layers run on [B, H] rows; new keys and values are scattered into the cache *before*
attention reads it in position order; the query heads of a group are folded into rows, so that the batched products
never have a single row (which would take another kernel).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from dspark_export.decoder import Attention, Decoder, Rope
from dspark_export.graph.blocks import Blocks, gate_up_names, qkv_names, rope_tables
from dspark_export.graph.layout import RaggedInputs, RaggedLayout, ragged_layout
from dspark_export.graph.linear import FloatLinears, Int8Linears, Linears
from dspark_export.graph.standard_form import StandardForm, make_dialect
from dspark_export.graph.tape import graph_input, graph_output
from dspark_export.quantization.activations import INPUT_PREFIX
from dspark_export.quantization.plan import Int8Plan
from dspark_export.weights import WeightSource

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
_LAST_NORM = "model.norm.weight"


@dataclass(frozen=True)
class _Place:
    """Where a layer's rows go and what they may see; cosines and sines of its rotation."""

    layout: RaggedLayout
    rotation: tuple[ir.Value, ir.Value]


class VerifierGraph:
    """Builds the graph of one decoder, or a part of it. Each instance builds once.

    With a ``plan`` the products are int8; the rest, the embedding included, is float32. ``probe`` adds the input of
    every product as an output, for the pass that makes a plan. ``standard`` asks for the standard dialect.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: WeightSource,
        taps: tuple[int, ...],
        max_context: int,
        weight_dtype: str = "float32",
        plan: Int8Plan | None = None,
        probe: bool = False,
        standard: StandardForm | None = None,
    ) -> None:
        self._decoder = decoder
        self._weights = weights
        self._taps = taps
        self._max_context = max_context
        self._query_index = graph_input("query_index", ir.DataType.INT64, ("R", "Q"))
        self._dialect = make_dialect(weight_dtype, standard, self._query_index)
        self._tape = self._dialect.tape
        self._standard = standard
        self._plan = plan
        self._probed: dict[str, ir.Value] | None = {} if probe else None
        self._layouts: dict[tuple[int, int | None], RaggedLayout] = {}
        self._rotations: dict[Rope, tuple[ir.Value, ir.Value]] = {}

    def _linears(self, rows: ir.Value) -> Linears:
        if self._standard is not None:
            return self._standard.linears(self._dialect, self._weights)
        if self._plan is not None:
            return Int8Linears(self._tape, self._weights, self._plan, rows)
        return FloatLinears(self._tape, self._weights, self._probed)

    def build(self) -> ir.Model:
        """The whole model; weights are read when it is saved."""
        decoder, tape = self._decoder, self._tape
        dtype = tape.compute
        shapes = [("R", kv_heads, self._dialect.cache_length, dim) for kv_heads, dim in decoder.cache_shapes]
        input_ids = graph_input("input_ids", ir.DataType.INT64, ("B",))
        ragged = self._ragged()
        blocks = self._blocks(ragged.positions)
        logit_rows = graph_input("logit_rows", ir.DataType.INT64, ("N",))
        caches = [
            graph_input(f"{kind}_cache_{layer}", dtype, shapes[layer])
            for layer in range(decoder.num_layers)
            for kind in ("key", "value")
        ]

        places = [self._place(ragged, layer, caches[2 * layer]) for layer in range(decoder.num_layers)]
        embedding = blocks.embedding(f"{EMBEDDING}.weight", self._standard is not None)
        residual = blocks.embed(embedding, input_ids)
        first = qkv_names("model.layers.0", decoder.layer_attention(0))
        normed = blocks.norm(residual, "model.layers.0.input_layernorm.weight", first)
        features, written = [], []
        for layer, place in enumerate(places):
            pair = (caches[2 * layer], caches[2 * layer + 1])
            normed, residual, keys, values = self._layer(blocks, layer, normed, residual, place, pair)
            written += [
                graph_output(keys, f"key_cache_{layer}_out", dtype, shapes[layer]),
                graph_output(values, f"value_cache_{layer}_out", dtype, shapes[layer]),
            ]
            if layer in self._taps:
                features.append(residual)

        wanted = tape.op("Gather", normed, logit_rows, axis=0)
        raw = self._linears(logit_rows).head(wanted, self._head, decoder.vocab_size, decoder.hidden_size)
        logits = tape.to_float(blocks.cap(raw))
        # TopK, not ArgMax: several times faster, takes the lowest index of equal ones as well, and puts NaN above all
        # numbers, so that one value tells whether a whole row is sound.
        top, best = tape.op("TopK", logits, tape.constant([1]), outputs=2, axis=1)
        tapped = tape.op("Concat", *features, axis=1) if len(features) > 1 else tape.op("Identity", features[0])
        outputs = [
            graph_output(logits, "logits", ir.DataType.FLOAT, ("N", decoder.vocab_size)),
            graph_output(tape.reshape(best, (-1,)), "argmax", ir.DataType.INT64, ("N",)),
            graph_output(tape.reshape(top, (-1,)), "top_logit", ir.DataType.FLOAT, ("N",)),
            graph_output(
                tape.to_float(tapped), "features", ir.DataType.FLOAT, ("B", len(self._taps) * decoder.hidden_size)
            ),
            *written,
        ]
        outputs += self._probes()
        inputs = [input_ids, ragged.positions, ragged.rows, ragged.columns, ragged.query_index, logit_rows]
        inputs += [*self._dialect.inputs, *caches]
        return tape.model("verifier", inputs, outputs, {"dspark.stage": "verifier", "dspark.family": decoder.family})

    def build_layer(self, layer: int) -> ir.Model:
        """One layer alone: the residual stream in and out, ``stream`` and ``stream_out``, float32 [B, H]."""
        decoder, ragged = self._decoder, self._ragged()
        stream = graph_input("stream", ir.DataType.FLOAT, ("B", decoder.hidden_size))
        kv_heads, dim = decoder.cache_shapes[layer]
        shape = ("R", kv_heads, self._dialect.cache_length, dim)
        caches = (
            graph_input("key_cache", ir.DataType.FLOAT, shape),
            graph_input("value_cache", ir.DataType.FLOAT, shape),
        )
        blocks, prefix = self._blocks(ragged.positions), f"model.layers.{layer}"
        normed = blocks.norm(stream, f"{prefix}.input_layernorm.weight")
        place = self._place(ragged, layer, caches[0])
        _, residual, _, _ = self._layer(blocks, layer, normed, stream, place, caches)
        outputs = [graph_output(residual, "stream_out", ir.DataType.FLOAT, ("B", decoder.hidden_size))]
        inputs = [stream, ragged.positions, ragged.rows, ragged.columns, ragged.query_index, *caches]
        return self._tape.model("layer", inputs, [*outputs, *self._probes()], {})

    def build_end(self) -> ir.Model:
        """What follows the last layer: the residual stream ``stream`` [B, H] in, ``logits`` [B, V] out, float32."""
        decoder = self._decoder
        stream = graph_input("stream", ir.DataType.FLOAT, ("B", decoder.hidden_size))
        blocks = self._blocks(stream)
        normed = blocks.norm(stream, _LAST_NORM)
        logits = blocks.cap(blocks.linears.head(normed, self._head, decoder.vocab_size, decoder.hidden_size))
        return self._tape.model(
            "end", [stream], [graph_output(logits, "logits", ir.DataType.FLOAT, ("B", decoder.vocab_size))], {}
        )

    @property
    def _head(self) -> str:
        return EMBEDDING if self._decoder.tied_embedding else HEAD

    def _blocks(self, rows: ir.Value) -> Blocks:
        return Blocks(self._dialect, self._decoder, self._weights, self._linears(rows))

    def _ragged(self) -> RaggedInputs:
        positions = graph_input("positions", ir.DataType.INT64, ("B",))
        return RaggedInputs(
            positions=positions,
            rows=graph_input("rows", ir.DataType.INT64, ("B",)),
            columns=graph_input("columns", ir.DataType.INT64, ("B",)),
            query_index=self._query_index,
            horizon=positions,
            window_end=positions,
        )

    def _probes(self) -> list[ir.Value]:
        """Inputs of the products so far, as outputs."""
        outputs = []
        for name, value in (self._probed or {}).items():
            # A copy: the same value may feed two products, and an output has one name.
            copy, label = self._tape.op("Identity", value), f"{INPUT_PREFIX}{name}"
            outputs.append(graph_output(copy, label, ir.DataType.FLOAT, ("rows", f"K.{name}")))
        return outputs

    def _layer(
        self,
        blocks: Blocks,
        layer: int,
        normed: ir.Value,
        residual: ir.Value,
        place: _Place,
        caches: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """The stream after a layer, normed for what follows and as it is [B, H]; the layer's caches with the new rows
        in them."""
        decoder, prefix = self._decoder, f"model.layers.{layer}"
        attention = decoder.layer_attention(layer)
        mixed, keys, values = self._attention(blocks, prefix, attention, normed, place, *caches)
        normed, residual = blocks.after_attention(prefix, mixed, residual, gate_up_names(prefix))
        fed_forward = blocks.mlp(prefix, normed)
        following = f"model.layers.{layer + 1}"
        norm, feeds = (
            (_LAST_NORM, (self._head,))
            if layer == decoder.num_layers - 1
            else (f"{following}.input_layernorm.weight", qkv_names(following, decoder.layer_attention(layer + 1)))
        )
        normed, residual = blocks.after_mlp(prefix, fed_forward, residual, norm, feeds)
        return normed, residual, keys, values

    def _attention(
        self,
        blocks: Blocks,
        prefix: str,
        attention: Attention,
        normed: ir.Value,
        place: _Place,
        key_cache: ir.Value,
        value_cache: ir.Value,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Output of the attention block [B, H] and the two caches after the new rows were written."""
        tape, layout = self._tape, place.layout
        joined, value = blocks.query_key_value(prefix, attention, normed)
        width = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        head_rows = tape.reshape(
            blocks.rotate(joined, width, layout.position_ids, place.rotation), (-1, attention.head_dim)
        )  # fmt: skip
        key = tape.op("Gather", head_rows, layout.key_rows, axis=0)  # [B, Hkv, D]
        query = tape.op("Gather", head_rows, layout.query_rows, axis=0)  # [R, Hkv, G*Q, D]
        value = tape.reshape(value, (-1, attention.num_kv_heads, attention.head_dim))
        keys = self._dialect.write(key_cache, layout.placement, key)
        values = self._dialect.write(value_cache, layout.placement, value)
        return blocks.output(prefix, attention, blocks.attend(attention, query, keys, values, layout)), keys, values

    def _place(self, ragged: RaggedInputs, layer: int, cache: ir.Value) -> _Place:
        """Indices and rotation of a layer with this key ``cache``; layers that are alike share them."""
        attention = self._decoder.layer_attention(layer)
        geometry = (attention.num_kv_heads, attention.window)
        if geometry not in self._layouts:
            self._layouts[geometry] = ragged_layout(self._dialect, ragged, attention, cache)
        if attention.rope not in self._rotations:
            suffix = f".{len(self._rotations)}" if self._rotations else ""
            self._rotations[attention.rope] = rope_tables(self._tape, attention.rope, self._max_context, suffix)
        return _Place(self._layouts[geometry], self._rotations[attention.rope])
