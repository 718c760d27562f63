"""Hyper-connections: H residual streams of a token are collapsed before a block and mixed behind it.

Sums over streams are products with constant matrices of zeros and ones, and batched products of a fixed size: sums that
do not depend on how many tokens a step has, nor on where in memory a row begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.tape import CONTRIB


@dataclass(frozen=True)
class Mixing:
    """What takes the result of a block back into the streams."""

    post: ir.Value
    """[B, streams, 1]: the weight of the block's result in each stream."""
    mix: ir.Value
    """[B, streams, streams]: stream j becomes the sum over i of mix[i, j] times stream i."""


def expand(parts: Parts, rows: ir.Value) -> ir.Value:
    """[B, H] -> the same in every stream, [B, streams, H]."""
    copies = [parts.tape.op("Unsqueeze", rows, parts.tape.constant([1]))] * parts.decoder.hyper.streams
    streams: ir.Value = parts.tape.op("Concat", *copies, axis=1)
    return streams


def collapse(parts: Parts, name: str, streams: ir.Value) -> tuple[ir.Value, Mixing]:
    """(what a block reads [B, H], how its result goes back). ``name``: such as layers.0.hc_attn"""
    tape, hyper = parts.tape, parts.decoder.hyper
    count = hyper.streams
    sizes = (count, count, count * count)
    shifted = parts.tape.op(
        "Add",
        tape.op("Mul", _logits(parts, f"{name}_fn", streams, sum(sizes)), _scales(parts, f"{name}_scale", sizes)),
        parts.exact(f"{name}_base", (sum(sizes),)),
    )
    pre, post, mix = parts.split(shifted, sizes)
    post = tape.op("Mul", tape.op("Sigmoid", post), tape.number(2.0))
    mix = tape.op("Softmax", tape.reshape(mix, (-1, count, count)), axis=-1)
    mix = tape.op("Add", tape.reshape(mix, (-1, count * count)), tape.number(hyper.epsilon))
    mix = _normalised(parts, mix, over_rows=True)
    for _ in range(hyper.iterations - 1):
        mix = _normalised(parts, _normalised(parts, mix, over_rows=False), over_rows=True)
    weighted = weighted_sum(parts, tape.op("Add", tape.op("Sigmoid", pre), tape.number(hyper.epsilon)), streams)
    return weighted, Mixing(tape.reshape(post, (-1, count, 1)), tape.reshape(mix, (-1, count, count)))


def merge(parts: Parts, mixing: Mixing, block: ir.Value, streams: ir.Value) -> ir.Value:
    """The streams [B, streams, H] after a block gave [B, H]."""
    tape = parts.tape
    added = tape.op("Mul", mixing.post, tape.op("Unsqueeze", block, tape.constant([1])))
    mixed = tape.op("FusedMatMul", mixing.mix, streams, domain=CONTRIB, transA=1)
    total: ir.Value = tape.op("Add", added, mixed)
    return total


def join(parts: Parts, streams: ir.Value) -> ir.Value:
    """The one stream [n, H] that the final norm reads."""
    tape, count = parts.tape, parts.decoder.hyper.streams
    scaled = tape.op("Mul", _logits(parts, "hc_head_fn", streams, count), parts.exact("hc_head_scale", (1,)))
    weights = tape.op("Sigmoid", tape.op("Add", scaled, parts.exact("hc_head_base", (count,))))
    return weighted_sum(parts, tape.op("Add", weights, tape.number(parts.decoder.hyper.epsilon)), streams)


def mean(parts: Parts, streams: ir.Value) -> ir.Value:
    """The mean of the streams, [B, H]."""
    count = parts.decoder.hyper.streams
    weights = parts.tape.constant(np.full((1, 1, count), 1 / count), np.float32)
    return parts.tape.reshape(parts.tape.op("MatMul", weights, streams), (-1, parts.decoder.hidden_size))


def weighted_sum(parts: Parts, weights: ir.Value, streams: ir.Value) -> ir.Value:
    """[B, streams] weights of [B, streams, H] -> [B, H]"""
    tape = parts.tape
    row = tape.op("Unsqueeze", weights, tape.constant([1]))
    return tape.reshape(tape.op("MatMul", row, streams), (-1, parts.decoder.hidden_size))


def _logits(parts: Parts, name: str, streams: ir.Value, width: int) -> ir.Value:
    flat = parts.decoder.hyper.streams * parts.decoder.hidden_size
    normed = parts.unit_norm(parts.tape.reshape(streams, (-1, flat)), flat)
    matrix = parts.exact(name, (flat, width), np.transpose)
    logits: ir.Value = parts.tape.op("MatMul", normed, matrix)
    return logits


def _scales(parts: Parts, name: str, sizes: tuple[int, ...]) -> ir.Value:
    return parts.exact(name, (sum(sizes),), lambda three: np.repeat(three, sizes) if three.shape == (3,) else three)


def _normalised(parts: Parts, mix: ir.Value, over_rows: bool) -> ir.Value:
    """Matrices [B, streams * streams] divided by their sums over rows (else over columns)."""
    tape, count = parts.tape, parts.decoder.hyper.streams
    ones, unit = np.ones((count, count)), np.eye(count)
    summing = tape.constant(np.kron(ones, unit) if over_rows else np.kron(unit, ones), np.float32)
    total = tape.op("Add", tape.op("MatMul", mix, summing), tape.number(parts.decoder.hyper.epsilon))
    divided: ir.Value = tape.op("Div", mix, total)
    return divided
