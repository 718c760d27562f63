"""The verifier's graph in ONNX Runtime's dialect: float32, ragged batch, slot cache written in place.

Every choice here serves one property: the logits of a position do not depend, bit for bit, on how its tokens were
batched, chunked or drafted. Linear layers run on [B, H] rows; new keys and values are scattered into the cache *before*
attention reads it in position order; the query heads of a group are folded into rows, so that the batched products
never have a single row (which would take another kernel).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.decoder import Decoder
from dspark_export.graph.layout import RaggedInputs, RaggedLayout, ragged_layout
from dspark_export.graph.tape import CONTRIB, GraphTape, graph_input, graph_output
from dspark_export.weights import WeightSource


class VerifierGraph:
    """Builds the graph of one decoder. ``build`` may be called once."""

    def __init__(
        self, decoder: Decoder, weights: WeightSource, taps: tuple[int, ...], max_context: int, weight_dtype: str
    ) -> None:
        self._decoder = decoder
        self._weights = weights
        self._taps = taps
        self._max_context = max_context
        self._tape = GraphTape(weight_dtype)

    def build(self) -> ir.Model:
        """The whole model; weights are read when it is saved."""
        decoder, tape = self._decoder, self._tape
        attention = decoder.attention
        cache_shape = ("R", attention.num_kv_heads, "C", attention.head_dim)
        input_ids = graph_input("input_ids", ir.DataType.INT64, ("B",))
        ragged = RaggedInputs(
            positions=graph_input("positions", ir.DataType.INT64, ("B",)),
            rows=graph_input("rows", ir.DataType.INT64, ("B",)),
            columns=graph_input("columns", ir.DataType.INT64, ("B",)),
            query_index=graph_input("query_index", ir.DataType.INT64, ("R", "Q")),
        )
        logit_rows = graph_input("logit_rows", ir.DataType.INT64, ("N",))
        caches = [
            graph_input(f"{kind}_cache_{layer}", ir.DataType.FLOAT, cache_shape)
            for layer in range(decoder.num_layers)
            for kind in ("key", "value")
        ]

        layout = ragged_layout(tape, ragged, attention, caches[0])
        cosines, sines = attention.rope.tables(self._max_context)
        rotation = tape.table("rope_cos", cosines), tape.table("rope_sin", sines)
        embedding = self._matrix("model.embed_tokens.weight", decoder.vocab_size, decoder.hidden_size)

        residual = tape.op("Gather", embedding, input_ids, axis=0)
        normed = self._norm(residual, "model.layers.0.input_layernorm.weight")
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
            normed, residual = self._add_and_norm(mixed, residual, f"{prefix}.post_attention_layernorm.weight")
            fed_forward = self._mlp(prefix, normed)
            last = layer == decoder.num_layers - 1
            following = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
            normed, residual = self._add_and_norm(fed_forward, residual, following)
            if layer in self._taps:
                features.append(residual)

        wanted = tape.op("Gather", normed, logit_rows, axis=0)
        head = (
            embedding
            if decoder.tied_embedding
            else self._matrix("lm_head.weight", decoder.vocab_size, decoder.hidden_size)
        )
        logits = tape.op("Gemm", wanted, head, transB=1)
        best = tape.op("ArgMax", logits, axis=1, keepdims=0)
        tapped = tape.op("Concat", *features, axis=1) if len(features) > 1 else tape.op("Identity", features[0])
        outputs = [
            graph_output(logits, "logits", ir.DataType.FLOAT, ("N", decoder.vocab_size)),
            graph_output(best, "argmax", ir.DataType.INT64, ("N",)),
            graph_output(tapped, "features", ir.DataType.FLOAT, ("B", len(self._taps) * decoder.hidden_size)),
            *written,
        ]
        inputs = [
            input_ids, ragged.positions, ragged.rows, ragged.columns, ragged.query_index, logit_rows, *caches
        ]  # fmt: skip
        return tape.model("verifier", inputs, outputs, {"dspark.stage": "verifier", "dspark.family": decoder.family})

    def _matrix(self, name: str, *shape: int) -> ir.Value:
        return self._tape.weight(name, shape, lambda: self._weights.read(name))

    def _norm(self, value: ir.Value, name: str) -> ir.Value:
        weight = self._matrix(name, self._decoder.hidden_size)
        normed: ir.Value = self._tape.op(
            "SimplifiedLayerNormalization", value, weight, axis=-1, epsilon=self._decoder.norm_eps
        )
        return normed

    def _add_and_norm(self, value: ir.Value, residual: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm(value + residual), value + residual)"""
        weight = self._matrix(name, self._decoder.hidden_size)
        normed, _, _, total = self._tape.op(
            "SkipSimplifiedLayerNormalization",
            value, residual, weight,
            domain=CONTRIB, outputs=4, epsilon=self._decoder.norm_eps,
        )  # fmt: skip
        return normed, total

    def _linear(self, value: ir.Value, prefix: str, names: tuple[str, ...], inner: int, bias: bool) -> ir.Value:
        """Several projections of one input as a single product: [B, inner] -> [B, sum of their widths]."""
        full = [f"{prefix}.{name}" for name in names]
        widths = [self._weights.shape(f"{name}.weight")[0] for name in full]
        fused = f"{prefix}.{'+'.join(names)}"
        weight = self._tape.weight(
            f"{fused}.weight",
            (inner, sum(widths)),
            lambda: np.concatenate([self._weights.read(f"{name}.weight") for name in full]).T,
        )
        product: ir.Value = self._tape.op("MatMul", value, weight)
        if not bias:
            return product
        offset = self._tape.weight(
            f"{fused}.bias",
            (sum(widths),),
            lambda: np.concatenate([self._weights.read(f"{name}.bias") for name in full]),
        )
        shifted: ir.Value = self._tape.op("Add", product, offset)
        return shifted

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
        tape, attention = self._tape, self._decoder.attention
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        width = heads + kv_heads
        projected = self._linear(
            normed,
            f"{prefix}.self_attn",
            ("q_proj", "k_proj", "v_proj"),
            self._decoder.hidden_size,
            attention.qkv_bias,
        )
        joined, value = tape.op(
            "Split", projected, tape.constant([width * dim, kv_heads * dim]), outputs=2, axis=1
        )  # fmt: skip
        if attention.qk_norm:
            joined = self._head_norm(prefix, joined)
        rotated = tape.op(
            "RotaryEmbedding",
            tape.reshape(joined, (1, -1, width * dim)),
            layout.position_ids,
            *rotation,
            domain=CONTRIB,
        )
        head_rows = tape.reshape(rotated, (-1, dim))
        key = tape.op("Gather", head_rows, layout.key_rows, axis=0)  # [B, Hkv, D]
        query = tape.op("Gather", head_rows, layout.query_rows, axis=0)  # [R, Hkv, G*Q, D]
        keys = tape.op("ScatterND", key_cache, layout.cache_index, key)
        values = tape.op("ScatterND", value_cache, layout.cache_index, tape.reshape(value, (-1, kv_heads, dim)))

        scores = tape.op("FusedMatMul", query, keys, domain=CONTRIB, transB=1, alpha=attention.scale)
        weights = tape.op("Softmax", tape.op("Add", scores, layout.bias), axis=-1)
        mixed = tape.op("MatMul", weights, values)  # [R, Hkv, G*Q, D]
        per_token = tape.op("Gather", tape.reshape(mixed, (-1, dim)), layout.output_rows, axis=0)
        output = self._linear(
            tape.reshape(per_token, (-1, heads * dim)),
            f"{prefix}.self_attn",
            ("o_proj",),
            heads * dim,
            attention.output_bias,
        )
        return output, keys, values

    def _head_norm(self, prefix: str, joined: ir.Value) -> ir.Value:
        """RMS norm of every query and key head, each kind with its own weight: [B, (Hq + Hkv) * D], same shape out."""
        tape, attention = self._tape, self._decoder.attention
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        width = heads + kv_heads
        names = (f"{prefix}.self_attn.q_norm.weight", f"{prefix}.self_attn.k_norm.weight")
        normed = tape.op(
            "SimplifiedLayerNormalization",
            tape.reshape(joined, (-1, width, dim)),
            tape.constant(np.ones(dim), np.float32),
            axis=-1,
            epsilon=self._decoder.norm_eps,
        )
        weight = tape.weight(
            f"{prefix}.self_attn.q_norm+k_norm.weight",
            (width, dim),
            lambda: np.repeat(np.stack([self._weights.read(name) for name in names]), (heads, kv_heads), axis=0),
        )
        return tape.reshape(tape.op("Mul", normed, weight), (-1, width * dim))

    def _mlp(self, prefix: str, normed: ir.Value) -> ir.Value:
        """down(silu(gate(x)) * up(x)), [B, H] -> [B, H]."""
        tape, decoder = self._tape, self._decoder
        both = self._linear(
            normed, f"{prefix}.mlp", ("gate_proj", "up_proj"), decoder.hidden_size, decoder.mlp_bias
        )  # fmt: skip
        gate, up = tape.op("Split", both, outputs=2, axis=1, num_outputs=2)
        silu = tape.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0)
        return self._linear(
            tape.op("Mul", silu, up), f"{prefix}.mlp", ("down_proj",), decoder.intermediate_size, decoder.mlp_bias
        )
