"""Parts that verifier and drafter graphs share: norms, fused projections, the MLP, the read of a slot cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.decoder import Attention, Decoder
from dspark_export.graph.layout import RaggedLayout
from dspark_export.graph.linear import Linears
from dspark_export.graph.tape import CONTRIB, GraphTape
from dspark_export.weights import WeightSource


@dataclass(frozen=True)
class Blocks:
    """Builds parts of one decoder on a tape. Shapes: B tokens, H hidden size; the others as in ``layout``."""

    tape: GraphTape
    decoder: Decoder
    weights: WeightSource
    linears: Linears

    def matrix(self, name: str, *shape: int) -> ir.Value:
        """A tensor of the checkpoint as it is."""
        return self.tape.weight(name, shape, lambda: self.weights.read(name))

    def norm_weight(self, name: str, feeds: tuple[str, ...] = ()) -> ir.Value:
        """An RMS norm's weight, divided by what the product of ``feeds`` wants its input divided by."""
        smoothing = self.linears.smoothing(feeds)
        if smoothing is None:
            return self.matrix(name, self.decoder.hidden_size)
        return self.tape.table(f"{name}.smoothed", self.weights.read(name).astype(np.float32) / smoothing)

    def norm(self, value: ir.Value, name: str, feeds: tuple[str, ...] = ()) -> ir.Value:
        """RMS norm over the hidden size; ``feeds``: the projections that alone read it."""
        weight = self.norm_weight(name, feeds)
        normed: ir.Value = self.tape.op(
            "SimplifiedLayerNormalization", value, weight, axis=-1, epsilon=self.decoder.norm_eps
        )
        return normed

    def add_and_norm(
        self, value: ir.Value, residual: ir.Value, name: str, feeds: tuple[str, ...] = ()
    ) -> tuple[ir.Value, ir.Value]:
        """(norm(value + residual), value + residual)"""
        weight = self.norm_weight(name, feeds)
        normed, _, _, total = self.tape.op(
            "SkipSimplifiedLayerNormalization",
            value, residual, weight,
            domain=CONTRIB, outputs=4, epsilon=self.decoder.norm_eps,
        )  # fmt: skip
        return normed, total

    def head_norm(self, value: ir.Value, names: tuple[str, ...], repeats: tuple[int, ...]) -> ir.Value:
        """RMS norm of every head of [B, heads * D]: ``repeats[i]`` heads in a row share the weight ``names[i]``."""
        dim, width = self.decoder.attention.head_dim, sum(repeats)
        normed = self.tape.op(
            "SimplifiedLayerNormalization",
            self.tape.reshape(value, (-1, width, dim)),
            self.tape.constant(np.ones(dim), np.float32),
            axis=-1,
            epsilon=self.decoder.norm_eps,
        )
        weight = self.tape.weight(
            "+".join(names),
            (width, dim),
            lambda: np.repeat(np.stack([self.weights.read(name) for name in names]), repeats, axis=0),
        )
        return self.tape.reshape(self.tape.op("Mul", normed, weight), (-1, width * dim))

    def rotate(
        self, value: ir.Value, heads: int, position_ids: ir.Value, rotation: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """Rotary embedding of [B, heads * D]; returns [B, 1, heads * D]. ``position_ids`` is [B, 1].

        Every token is a sequence of its own: the operator refuses sequences longer than its tables, and a step may hold
        more tokens than the context.
        """
        shaped = self.tape.reshape(value, (-1, 1, heads * self.decoder.attention.head_dim))
        rotated: ir.Value = self.tape.op("RotaryEmbedding", shaped, position_ids, *rotation, domain=CONTRIB)
        return rotated

    def attend(self, query: ir.Value, keys: ir.Value, values: ir.Value, layout: RaggedLayout) -> ir.Value:
        """Attention of [R, Hkv, G*Q, D] over a cache [R, Hkv, C, D], back in token order: [B, Hq * D]."""
        tape, attention = self.tape, self.decoder.attention
        scores = tape.op("FusedMatMul", query, keys, domain=CONTRIB, transB=1, alpha=attention.scale)
        weights = tape.op("Softmax", tape.op("Add", scores, layout.bias), axis=-1)
        mixed = tape.op("MatMul", weights, values)
        per_token = tape.op("Gather", tape.reshape(mixed, (-1, attention.head_dim)), layout.output_rows, axis=0)
        return tape.reshape(per_token, (-1, attention.num_heads * attention.head_dim))

    def mlp(self, prefix: str, normed: ir.Value) -> ir.Value:
        """down(silu(gate(x)) * up(x)), [B, H] -> [B, H]."""
        tape, decoder = self.tape, self.decoder
        down = (f"{prefix}.mlp.down_proj",)
        smoothing = self.linears.smoothing(down)
        # The product of both is what is smoothed, and the up projection alone enters it linearly.
        divisors = {} if smoothing is None else {f"{prefix}.mlp.up_proj": smoothing}
        both = self.linears.apply(normed, gate_up_names(prefix), decoder.hidden_size, decoder.mlp_bias, divisors)
        gate, up = tape.op("Split", both, outputs=2, axis=1, num_outputs=2)
        silu = tape.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0)
        return self.linears.apply(tape.op("Mul", silu, up), down, decoder.intermediate_size, decoder.mlp_bias)

    def query_key_value(self, prefix: str, normed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Queries and keys of a layer [B, (Hq + Hkv) * D], head-normed where the model does that, and its values."""
        attention = self.decoder.attention
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        smoothing = self.linears.smoothing(output_names(prefix))
        # The heads of a group share a value, so that its smoothing is the same for all of them.
        values = None if smoothing is None else smoothing.reshape(kv_heads, -1, dim)[:, 0].reshape(-1)
        divisors = {} if values is None else {f"{prefix}.self_attn.v_proj": values}
        projected = self.linears.apply(
            normed, qkv_names(prefix), self.decoder.hidden_size, attention.qkv_bias, divisors
        )
        sizes = self.tape.constant([(heads + kv_heads) * dim, kv_heads * dim])
        joined, value = self.tape.op("Split", projected, sizes, outputs=2, axis=1)
        if attention.qk_norm:
            names = (f"{prefix}.self_attn.q_norm.weight", f"{prefix}.self_attn.k_norm.weight")
            joined = self.head_norm(joined, names, (heads, kv_heads))
        return joined, value

    def output(self, prefix: str, mixed: ir.Value) -> ir.Value:
        """The attention's output projection, [B, Hq * D] -> [B, H]."""
        attention = self.decoder.attention
        width = attention.num_heads * attention.head_dim
        return self.linears.apply(mixed, output_names(prefix), width, attention.output_bias)


def qkv_names(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.self_attn.{name}_proj" for name in ("q", "k", "v"))


def output_names(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}.self_attn.o_proj",)


def gate_up_names(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")


def rope_tables(tape: GraphTape, attention: Attention, positions: int) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine tables as initializers."""
    cosines, sines = attention.rope.tables(positions)
    return tape.table("rope_cos", cosines), tape.table("rope_sin", sines)
