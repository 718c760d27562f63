"""The verifier's graph in ONNX Runtime's dialect: float32, ragged batch, slot cache written in place.

Every choice here serves one property: the logits of a position do not depend, bit for bit, on how its tokens were
batched, chunked or drafted. Linear layers run on [B, H] rows; new keys and values are scattered into the cache *before*
attention reads it in position order; the query heads of a group are folded into rows, so that the batched products
never have a single row (which would take another kernel).
"""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.decoder import Decoder
from dspark_export.graph.blocks import Blocks, rope_tables
from dspark_export.graph.layout import RaggedInputs, RaggedLayout, ragged_layout
from dspark_export.graph.tape import GraphTape, graph_input, graph_output
from dspark_export.weights import WeightSource

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class VerifierGraph:
    """Builds the graph of one decoder. ``build`` may be called once."""

    def __init__(
        self, decoder: Decoder, weights: WeightSource, taps: tuple[int, ...], max_context: int, weight_dtype: str
    ) -> None:
        self._decoder = decoder
        self._taps = taps
        self._max_context = max_context
        self._tape = GraphTape(weight_dtype)
        self._blocks = Blocks(self._tape, decoder, weights)

    def build(self) -> ir.Model:
        """The whole model; weights are read when it is saved."""
        decoder, tape, blocks = self._decoder, self._tape, self._blocks
        attention = decoder.attention
        cache_shape = ("R", attention.num_kv_heads, "C", attention.head_dim)
        input_ids = graph_input("input_ids", ir.DataType.INT64, ("B",))
        positions = graph_input("positions", ir.DataType.INT64, ("B",))
        ragged = RaggedInputs(
            positions=positions,
            rows=graph_input("rows", ir.DataType.INT64, ("B",)),
            columns=graph_input("columns", ir.DataType.INT64, ("B",)),
            query_index=graph_input("query_index", ir.DataType.INT64, ("R", "Q")),
            horizon=positions,
        )
        logit_rows = graph_input("logit_rows", ir.DataType.INT64, ("N",))
        caches = [
            graph_input(f"{kind}_cache_{layer}", ir.DataType.FLOAT, cache_shape)
            for layer in range(decoder.num_layers)
            for kind in ("key", "value")
        ]

        layout = ragged_layout(tape, ragged, attention, caches[0])
        rotation = rope_tables(tape, attention, self._max_context)
        embedding = blocks.matrix(EMBEDDING, decoder.vocab_size, decoder.hidden_size)
        residual = tape.op("Gather", embedding, input_ids, axis=0)
        normed = blocks.norm(residual, "model.layers.0.input_layernorm.weight")
        features, written = [], []
        for layer in range(decoder.num_layers):
            prefix = f"model.layers.{layer}"
            mixed, keys, values = self._attention(
                prefix, normed, layout, rotation, caches[2 * layer], caches[2 * layer + 1]
            )
            written += [
                graph_output(keys, f"key_cache_{layer}_out", ir.DataType.FLOAT, cache_shape),
                graph_output(values, f"value_cache_{layer}_out", ir.DataType.FLOAT, cache_shape),
            ]
            normed, residual = blocks.add_and_norm(mixed, residual, f"{prefix}.post_attention_layernorm.weight")
            fed_forward = blocks.mlp(prefix, normed)
            last = layer == decoder.num_layers - 1
            following = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
            normed, residual = blocks.add_and_norm(fed_forward, residual, following)
            if layer in self._taps:
                features.append(residual)

        wanted = tape.op("Gather", normed, logit_rows, axis=0)
        head = embedding
        if not decoder.tied_embedding:
            head = blocks.matrix(HEAD, decoder.vocab_size, decoder.hidden_size)
        logits = tape.op("Gemm", wanted, head, transB=1)
        best = tape.op("ArgMax", logits, axis=1, keepdims=0)
        tapped = tape.op("Concat", *features, axis=1) if len(features) > 1 else tape.op("Identity", features[0])
        outputs = [
            graph_output(logits, "logits", ir.DataType.FLOAT, ("N", decoder.vocab_size)),
            graph_output(best, "argmax", ir.DataType.INT64, ("N",)),
            graph_output(tapped, "features", ir.DataType.FLOAT, ("B", len(self._taps) * decoder.hidden_size)),
            *written,
        ]
        inputs = [input_ids, positions, ragged.rows, ragged.columns, ragged.query_index, logit_rows, *caches]
        return tape.model("verifier", inputs, outputs, {"dspark.stage": "verifier", "dspark.family": decoder.family})

    def _attention(
        self,
        prefix: str,
        normed: ir.Value,
        layout: RaggedLayout,
        rotation: tuple[ir.Value, ir.Value],
        key_cache: ir.Value,
        value_cache: ir.Value,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Output of the attention block [B, H] and the two caches after the new rows were written."""
        tape, blocks, attention = self._tape, self._blocks, self._decoder.attention
        joined, value = blocks.query_key_value(prefix, normed)
        width = attention.num_heads + attention.num_kv_heads
        head_rows = tape.reshape(
            blocks.rotate(joined, width, layout.position_ids, rotation), (-1, attention.head_dim)
        )  # fmt: skip
        key = tape.op("Gather", head_rows, layout.key_rows, axis=0)  # [B, Hkv, D]
        query = tape.op("Gather", head_rows, layout.query_rows, axis=0)  # [R, Hkv, G*Q, D]
        value = tape.reshape(value, (-1, attention.num_kv_heads, attention.head_dim))
        keys = tape.op("ScatterND", key_cache, layout.cache_index, key)
        values = tape.op("ScatterND", value_cache, layout.cache_index, value)
        return blocks.output(prefix, blocks.attend(query, keys, values, layout)), keys, values
