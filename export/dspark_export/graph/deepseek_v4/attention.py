"""Attention of a layer: one latent row a position is key and value of all heads, beside compressed entries.

Every token's heads are one batched product of a fixed number of rows, so that its bits do not depend on its company.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.deepseek_v4 import Compression
from dspark_export.graph.deepseek_v4.compressor import compress
from dspark_export.graph.deepseek_v4.indexer import chosen_bias
from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.deepseek_v4.place import Place, bias
from dspark_export.graph.deepseek_v4.rotation import rotate
from dspark_export.graph.tape import CONTRIB


@dataclass(frozen=True)
class Caches:
    """Key and value cache of a layer, [R, 1, C, W]."""

    keys: ir.Value
    values: ir.Value


@dataclass(frozen=True)
class _Series:
    """Where a compressor's vectors and gates are: names of its projections, channels of both."""

    name: str
    width: int


def attention(parts: Parts, layer: int, normed: ir.Value, caches: Caches, place: Place) -> tuple[ir.Value, Caches]:
    """(output [B, H], the caches after the new rows were written) of ``normed`` [B, H]"""
    tape, decoder, name = parts.tape, parts.decoder, f"layers.{layer}.attn"
    heads, dim = decoder.attention.num_heads, decoder.attention.head_dim
    compression, turn = decoder.compressions[layer], place.rotations[decoder.layer_rope(layer)]
    series = _series(name, compression, dim)
    count = 0 if compression is None else compression.series
    indexer = None if compression is None else compression.indexer
    names = [f"{name}.wq_a", f"{name}.wkv"]
    names += [f"{one.name}.{kind}" for kind in ("wkv", "wgate") for one in series]
    sizes = [decoder.query_rank, dim, *[count * one.width for one in series] * 2]
    if indexer is not None:
        names.append(f"{name}.indexer.weights_proj")
        sizes.append(indexer.heads)
    low, latent, *rest = parts.split(parts.product(normed, names, decoder.hidden_size), sizes)
    residual = parts.norm(low, f"{name}.q_norm", decoder.query_rank)
    query = parts.product(residual, (f"{name}.wq_b",), decoder.query_rank)
    query = rotate(parts, parts.unit_norm(tape.reshape(query, (-1, heads, dim)), dim), dim, turn)
    latent = tape.reshape(parts.norm(latent, f"{name}.norm", dim), (-1, 1, dim))
    halves = parts.split(rotate(parts, latent, dim, turn), [dim // 2, dim // 2])

    widths = [dim // 2, *(count * one.width for one in series)]
    own = [[halves[0], *rest[: len(series)]], [halves[1], *rest[len(series) : 2 * len(series)]]]
    written = Caches(*(_write(parts, cache, place, rows) for cache, rows in zip(_both(caches), own, strict=True)))
    stored = [parts.split(cache, widths) for cache in _both(written)]
    latents = tape.op("Concat", stored[0][0], stored[1][0], axis=-1)  # [R, 1, C, D]

    entries, entry_bias = None, None
    if compression is not None:
        where = place.entries[compression.rate]
        made = [
            compress(parts, one.name, compression, one.width, stored[0][index], stored[1][index], where)
            for index, one in enumerate(series, start=1)
        ]
        entries = tape.op("Unsqueeze", made[0], tape.constant([1]))  # [R, 1, T, D]
        if indexer is None:
            seen = bias(parts.dialect, where.ready)
        else:
            seen = chosen_bias(
                parts, f"{name}.indexer", indexer, residual, rest[-1], made[1], turn, where, place
            )  # fmt: skip
        entry_bias = tape.op("Unsqueeze", seen, tape.constant([2]))
    mixed = _attend(parts, name, query, latents, entries, entry_bias, place)
    # Values were rotated with the keys they are; turned back, they depend on the distance alone.
    return _output(parts, name, rotate(parts, mixed, dim, turn, back=True)), written


def _series(name: str, compression: Compression | None, dim: int) -> list[_Series]:
    if compression is None:
        return []
    own = _Series(f"{name}.compressor", dim)
    if compression.indexer is None:
        return [own]
    return [own, _Series(f"{name}.indexer.compressor", compression.indexer.head_dim)]


def _both(caches: Caches) -> tuple[ir.Value, ir.Value]:
    return caches.keys, caches.values


def _write(parts: Parts, cache: ir.Value, place: Place, rows: list[ir.Value]) -> ir.Value:
    """The cache with new rows: the first of them [B, 1, .], the others [B, .]."""
    tape = parts.tape
    first, *others = rows
    joined = first
    if others:
        lifted = [tape.op("Unsqueeze", value, tape.constant([1])) for value in others]
        joined = tape.op("Concat", first, *lifted, axis=-1)
    return parts.dialect.write(cache, place.placement, joined)


def _attend(
    parts: Parts,
    name: str,
    query: ir.Value,
    latents: ir.Value,
    entries: ir.Value | None,
    entry_bias: ir.Value | None,
    place: Place,
) -> ir.Value:
    """[B, heads, D] over latents [R, 1, C, D] and entries [R, 1, T, D], with a sink a head that takes weight from both."""
    tape, shape = parts.tape, parts.decoder.attention
    grid = tape.op("Gather", query, place.query_index, axis=0)  # [R, Q, heads, D]
    keys, biases = [latents], [place.window_bias]
    if entries is not None and entry_bias is not None:
        keys, biases = [latents, entries], [place.window_bias, entry_bias]
    scores = [
        tape.op("Add", tape.op("FusedMatMul", grid, key, domain=CONTRIB, transB=1, alpha=shape.scale), added)
        for key, added in zip(keys, biases, strict=True)
    ]
    sinks = parts.exact(f"{name}.attn_sink", (shape.num_heads, 1), lambda stored: stored.reshape(-1, 1))
    places = tape.op("Shape", place.query_index)
    sinks = tape.op("Expand", sinks, tape.op("Concat", places, tape.constant([shape.num_heads, 1]), axis=0))
    weights = tape.op("Softmax", tape.op("Concat", *scores, sinks, axis=-1), axis=-1)
    lengths = [tape.op("Shape", key, start=2, end=3) for key in keys]
    sizes = tape.op("Concat", *lengths, tape.constant([1]), axis=0)
    own = tape.op("Split", weights, sizes, outputs=len(keys) + 1, axis=-1)[:-1]
    parts_of = [tape.op("MatMul", weight, key) for weight, key in zip(own, keys, strict=True)]
    mixed = parts_of[0] if len(parts_of) == 1 else tape.op("Add", *parts_of)
    rows = tape.reshape(mixed, (-1, shape.num_heads, shape.head_dim))
    back: ir.Value = tape.op("Gather", rows, place.output_rows, axis=0)
    return back


def _output(parts: Parts, name: str, mixed: ir.Value) -> ir.Value:
    """Heads [B, heads, D] in groups to a low rank each, and all of these to [B, H]."""
    tape, decoder = parts.tape, parts.decoder
    groups, rank = decoder.output_groups, decoder.output_rank
    width = decoder.attention.num_heads * decoder.attention.head_dim // groups
    inputs = parts.split(tape.reshape(mixed, (-1, groups * width)), [width] * groups)
    low = []
    for group, value in enumerate(inputs):
        rows = slice(group * rank, (group + 1) * rank)
        weight = tape.weight(
            f"{name}.wo_a.weight.{group}",
            (width, rank),
            lambda rows=rows: np.transpose(parts.weights.read(f"{name}.wo_a.weight")[rows]),
        )
        low.append(tape.op("MatMul", value, weight))
    joined = low[0] if groups == 1 else tape.op("Concat", *low, axis=1)
    return parts.product(joined, (f"{name}.wo_b",), groups * rank)
