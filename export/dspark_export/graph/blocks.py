"""Parts that verifier and drafter graphs share: norms, fused projections, the MLP, the read of a slot cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING
from dspark_export.decoder import Attention, Decoder, Rope
from dspark_export.graph.dialect import Dialect
from dspark_export.graph.layout import RaggedLayout
from dspark_export.graph.linear import Linears
from dspark_export.graph.tape import GraphTape
from dspark_export.weights import WeightSource


@dataclass(frozen=True)
class Blocks:
    """Builds parts of one decoder in a dialect. Shapes: B tokens, H hidden size; the others as in ``layout``."""

    dialect: Dialect
    decoder: Decoder
    weights: WeightSource
    linears: Linears

    @property
    def tape(self) -> GraphTape:
        return self.dialect.tape

    def matrix(self, name: str, *shape: int) -> ir.Value:
        """A tensor of the checkpoint as it is."""
        return self.tape.weight(name, shape, lambda: self.weights.read(name))

    def embedding(self, name: str, shared: bool) -> ir.Value:
        """The token embedding [V, H]: the checkpoint's, or one that whoever loads the graph provides."""
        shape = (self.decoder.vocab_size, self.decoder.hidden_size)
        return self.dialect.shared(SHARED_EMBEDDING, shape) if shared else self.matrix(name, *shape)

    def norm_weight(self, name: str, feeds: tuple[str, ...] = ()) -> ir.Value:
        """An RMS norm's weight, divided by what the product of ``feeds`` wants its input divided by."""
        smoothing = self.linears.smoothing(feeds)
        if smoothing is None:
            return self.tape.weight(name, (self.decoder.hidden_size,), lambda: self._norm_array(name))
        return self.tape.table(f"{name}.smoothed", self._norm_array(name).astype(np.float32) / smoothing)

    def _norm_array(self, name: str) -> NDArray[Any]:
        """What a norm multiplies by: the stored weight, or 1 more, summed in float32."""
        stored = self.weights.read(name)
        return stored.astype(np.float32) + np.float32(1.0) if self.decoder.norm_offset else stored

    def norm(self, value: ir.Value, name: str, feeds: tuple[str, ...] = ()) -> ir.Value:
        """RMS norm over the hidden size; ``feeds``: the projections that alone read it."""
        return self.dialect.norm(value, self.norm_weight(name, feeds), self.decoder.norm_eps)

    def add_and_norm(
        self, value: ir.Value, residual: ir.Value, name: str, feeds: tuple[str, ...] = ()
    ) -> tuple[ir.Value, ir.Value]:
        """(norm(value + residual), value + residual)"""
        return self.dialect.add_and_norm(value, residual, self.norm_weight(name, feeds), self.decoder.norm_eps)

    def unit_norm(self, value: ir.Value, width: int, dim: int) -> ir.Value:
        """RMS norm without weight of every head of [B, width * dim]: [B, width, dim]."""
        heads = self.tape.reshape(value, (-1, width, dim))
        return self.dialect.norm(heads, self.tape.number(np.ones(dim)), self.decoder.norm_eps)

    def head_norm(self, value: ir.Value, dim: int, names: tuple[str, ...], repeats: tuple[int, ...]) -> ir.Value:
        """RMS norm of every head of [B, heads * dim]: ``repeats[i]`` heads in a row share the weight ``names[i]``."""
        width = sum(repeats)
        weight = self.tape.weight(
            "+".join(names),
            (width, dim),
            lambda: np.repeat(np.stack([self._norm_array(name) for name in names]), repeats, axis=0),
        )
        normed = self.unit_norm(value, width, dim)
        return self.tape.reshape(self.tape.op("Mul", normed, weight), (-1, width * dim))

    def value_norm(self, value: ir.Value, heads: int, dim: int, divisors: FloatArray | None = None) -> ir.Value:
        """RMS norm without weight of every value head of [B, heads * dim], then divided by ``divisors``."""
        normed = self.tape.reshape(self.unit_norm(value, heads, dim), (-1, heads * dim))
        if divisors is None:
            return normed
        scaled: ir.Value = self.tape.op("Mul", normed, self.tape.number(1.0 / divisors))
        return scaled

    def embed(self, embedding: ir.Value, tokens: ir.Value) -> ir.Value:
        """Rows of the embedding [V, H], scaled where the model does that: [B, H]."""
        rows: ir.Value = self.tape.op("Gather", embedding, tokens, axis=0)
        if self.decoder.embedding_scale == 1.0:
            return rows
        scaled: ir.Value = self.tape.op("Mul", rows, self.tape.number(self.decoder.embedding_scale))
        return scaled

    def cap(self, logits: ir.Value) -> ir.Value:
        """cap * tanh(logits / cap), where the model caps its logits."""
        if self.decoder.logit_cap is None:
            return logits
        limit = self.tape.number(self.decoder.logit_cap)
        capped: ir.Value = self.tape.op("Mul", self.tape.op("Tanh", self.tape.op("Div", logits, limit)), limit)
        return capped

    def after_attention(
        self, prefix: str, mixed: ir.Value, residual: ir.Value, feeds: tuple[str, ...] = ()
    ) -> tuple[ir.Value, ir.Value]:
        """(what the MLP reads, the residual stream) after a layer's attention gave ``mixed``."""
        if not self.decoder.branch_norms:
            return self.add_and_norm(mixed, residual, f"{prefix}.post_attention_layernorm.weight", feeds)
        mixed = self.norm(mixed, f"{prefix}.post_attention_layernorm.weight")
        return self.add_and_norm(mixed, residual, f"{prefix}.pre_feedforward_layernorm.weight", feeds)

    def after_mlp(
        self, prefix: str, mixed: ir.Value, residual: ir.Value, following: str, feeds: tuple[str, ...] = ()
    ) -> tuple[ir.Value, ir.Value]:
        """(stream normed by ``following``, the residual stream) after a layer's MLP gave ``mixed``."""
        if self.decoder.branch_norms:
            mixed = self.norm(mixed, f"{prefix}.post_feedforward_layernorm.weight")
        if not self.decoder.layer_scalar:
            return self.add_and_norm(mixed, residual, following, feeds)
        total = self.tape.op("Add", mixed, residual)
        total = self.tape.op("Mul", total, self.matrix(f"{prefix}.layer_scalar", 1))
        return self.norm(total, following, feeds), total

    def rotate(
        self, value: ir.Value, width: int, position_ids: ir.Value, rotation: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """Rotary embedding of heads side by side, [B, width]; returns [B, 1, width]. ``position_ids`` is [B, 1]."""
        shaped = self.tape.reshape(value, (-1, 1, width))
        return self.dialect.rotate(shaped, width, position_ids, rotation)

    def attend(
        self, attention: Attention, query: ir.Value, keys: ir.Value, values: ir.Value, layout: RaggedLayout
    ) -> ir.Value:
        """Attention of [R, Hkv, G*Q, D] over a cache [R, Hkv, C, D], back in token order: [B, Hq * D]."""
        tape = self.tape
        mixed = self.dialect.attend(query, keys, values, layout.mask, attention)
        per_token = tape.op("Gather", tape.reshape(mixed, (-1, attention.head_dim)), layout.output_rows, axis=0)
        return tape.reshape(per_token, (-1, attention.num_heads * attention.head_dim))

    def mlp(self, prefix: str, normed: ir.Value) -> ir.Value:
        """down(activation(gate(x)) * up(x)), [B, H] -> [B, H]."""
        tape, decoder = self.tape, self.decoder
        down = (f"{prefix}.mlp.down_proj",)
        smoothing = self.linears.smoothing(down)
        # The product of both is what is smoothed, and the up projection alone enters it linearly.
        divisors = {} if smoothing is None else {f"{prefix}.mlp.up_proj": smoothing}
        both = self.linears.apply(normed, gate_up_names(prefix), decoder.hidden_size, decoder.mlp_bias, divisors)
        gate, up = tape.op("Split", both, outputs=2, axis=1, num_outputs=2)
        active = self.dialect.silu(gate) if decoder.activation == "silu" else self.dialect.gelu_tanh(gate)
        return self.linears.apply(tape.op("Mul", active, up), down, decoder.intermediate_size, decoder.mlp_bias)

    def query_key_value(self, prefix: str, attention: Attention, normed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Queries and keys of a layer [B, (Hq + Hkv) * D], head-normed where the model does that, and its values
        [B, Hkv * D]."""
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        smoothing = self.linears.smoothing(output_names(prefix))
        # The heads of a group share a value, so that its smoothing is the same for all of them.
        values = None if smoothing is None else smoothing.reshape(kv_heads, -1, dim)[:, 0].reshape(-1)
        # What a norm would undo comes after it.
        folded = values is not None and not attention.value_norm
        divisors = {f"{prefix}.self_attn.v_proj": values} if folded and values is not None else {}
        names = qkv_names(prefix, attention)
        joined = self.linears.apply(normed, names, self.decoder.hidden_size, attention.qkv_bias, divisors)
        if attention.keys_are_values:
            sizes = self.tape.constant([heads * dim, kv_heads * dim])
            _, value = self.tape.op("Split", joined, sizes, outputs=2, axis=1)
        else:
            sizes = self.tape.constant([(heads + kv_heads) * dim, kv_heads * dim])
            joined, value = self.tape.op("Split", joined, sizes, outputs=2, axis=1)
        if attention.qk_norm:
            norms = (f"{prefix}.self_attn.q_norm.weight", f"{prefix}.self_attn.k_norm.weight")
            joined = self.head_norm(joined, dim, norms, (heads, kv_heads))
        if attention.value_norm:
            value = self.value_norm(value, kv_heads, dim, values)
        return joined, value

    def output(self, prefix: str, attention: Attention, mixed: ir.Value) -> ir.Value:
        """The attention's output projection, [B, Hq * D] -> [B, H]."""
        width = attention.num_heads * attention.head_dim
        return self.linears.apply(mixed, output_names(prefix), width, attention.output_bias)


def qkv_names(prefix: str, attention: Attention) -> tuple[str, ...]:
    kinds = ("q", "k") if attention.keys_are_values else ("q", "k", "v")
    return tuple(f"{prefix}.self_attn.{kind}_proj" for kind in kinds)


def output_names(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}.self_attn.o_proj",)


def gate_up_names(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")


def rope_tables(tape: GraphTape, rope: Rope, positions: int, suffix: str = "") -> tuple[ir.Value, ir.Value]:
    """Cosine and sine tables as initializers, whose names end in ``suffix``."""
    cosines, sines = rope.tables(positions)
    dtype = tape.compute.numpy()
    return (
        tape.table(f"rope_cos{suffix}", cosines.astype(dtype)),
        tape.table(f"rope_sin{suffix}", sines.astype(dtype)),
    )
