"""Mixture of experts: every expert computes the tokens that chose it, one after another.

An expert is a product of its own, so that weights are read one at a time and a token's bits do not depend on how many
others chose the same expert.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dspark_export.graph.deepseek_v4.parts import Parts


def mixture(parts: Parts, layer: int, normed: ir.Value, input_ids: ir.Value) -> ir.Value:
    """[B, H] -> [B, H]: the chosen experts, weighted, and the shared one."""
    name, hidden, inner = f"layers.{layer}.ffn", parts.decoder.hidden_size, parts.decoder.intermediate_size
    gate, up = parts.split(
        parts.product(normed, (f"{name}.shared_experts.w1", f"{name}.shared_experts.w3"), hidden), [inner, inner]
    )
    shared = parts.product(parts.gated(gate, up), (f"{name}.shared_experts.w2",), inner)
    routed = _routed(parts, name, normed, _weights(parts, name, layer, normed, input_ids))
    total: ir.Value = parts.tape.op("Add", routed, shared)
    return total


def _weights(parts: Parts, name: str, layer: int, normed: ir.Value, input_ids: ir.Value) -> ir.Value:
    """[experts, B]: the weight of every expert in every token, 0 where it was not chosen."""
    tape, decoder, experts = parts.tape, parts.decoder, parts.decoder.experts
    scores = _scores(parts, parts.product(normed, (f"{name}.gate",), decoder.hidden_size))
    if decoder.hash_routed[layer]:
        table = parts.integers(f"{name}.gate.tid2eid", (decoder.vocab_size, experts.chosen))
        index = tape.op("Gather", table, input_ids, axis=0)
    else:
        ranked = tape.op("Add", scores, parts.exact(f"{name}.gate.bias", (experts.count,)))
        _, index = tape.op("TopK", ranked, tape.constant([experts.chosen]), outputs=2, axis=1)
    chosen = tape.op("GatherElements", scores, index, axis=1)
    # A sum as a product: its order does not depend on where in memory a row begins.
    total = tape.op("MatMul", chosen, parts.ones(experts.chosen, 1))
    shares = tape.op("Div", chosen, tape.op("Add", total, tape.number(1e-20)))
    shares = tape.op("Mul", shares, tape.number(experts.scale))
    nothing = tape.op("Expand", tape.number(0.0), tape.op("Shape", scores))
    # A table may name an expert twice.
    spread = tape.op("ScatterElements", nothing, index, shares, axis=1, reduction="add")
    columns: ir.Value = tape.op("Transpose", spread, perm=[1, 0])
    return columns


def _scores(parts: Parts, logits: ir.Value) -> ir.Value:
    """sqrt(log(1 + exp(x))). In float64: the kernels of exp and log round the ends of an array differently from its
    middle, which would let a token's bits depend on its place in the batch."""
    tape = parts.tape
    wide = tape.op("Cast", logits, to=ir.DataType.DOUBLE)
    small = tape.op("Exp", tape.op("Neg", tape.op("Abs", wide)))
    tail = tape.op("Log", tape.op("Add", small, tape.constant(1.0, np.float64)))
    softplus = tape.op("Add", tape.op("Max", wide, tape.constant(0.0, np.float64)), tail)
    scores: ir.Value = tape.op("Cast", tape.op("Sqrt", softplus), to=ir.DataType.FLOAT)
    return scores


def _routed(parts: Parts, name: str, normed: ir.Value, weights: ir.Value) -> ir.Value:
    """Sum over the experts of their result times their weight, [B, H]."""
    tape, hidden, inner = parts.tape, parts.decoder.hidden_size, parts.decoder.intermediate_size
    total: ir.Value = tape.op("Expand", tape.number(0.0), tape.op("Shape", normed))
    for expert in range(parts.decoder.experts.count):
        own = tape.op("Gather", weights, tape.constant(expert), axis=0)  # [B]
        tokens = tape.op("Transpose", tape.op("NonZero", own), perm=[1, 0])  # [n, 1]
        prefix = f"{name}.experts.{expert}"
        both = parts.product(tape.op("GatherND", normed, tokens), (f"{prefix}.w1", f"{prefix}.w3"), hidden)
        gate, up = parts.split(both, [inner, inner])
        result = parts.product(parts.gated(gate, up), (f"{prefix}.w2",), inner)
        share = tape.op("Unsqueeze", tape.op("GatherND", own, tokens), tape.constant([1]))
        total = tape.op("ScatterND", total, tokens, tape.op("Mul", result, share), reduction="add")
    return total
