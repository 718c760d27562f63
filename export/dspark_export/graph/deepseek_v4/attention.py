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
from dspark_export.graph.deepseek_v4.place import MASKED, Place, bias
from dspark_export.graph.deepseek_v4.products import mixture_of_rows, scores
from dspark_export.graph.deepseek_v4.rotation import Rotation, rotate

_SOFTMAX_BLOCK = 128
"""A multiple of what any kernel adds at once; caches are multiples of it, too."""


@dataclass(frozen=True)
class Caches:
    """Key and value cache of a layer, [R, 1, C, W]: vectors and gates of compressors behind half a latent each."""

    keys: ir.Value
    values: ir.Value


@dataclass(frozen=True)
class Halves:
    """Latent rows as the caches hold them, [n, 1, D / 2] each: the first half among the keys, the second among the
    values."""

    first: ir.Value
    second: ir.Value


@dataclass(frozen=True)
class _Series:
    """A compressor: the beginning of its tensors' names, and the channels of its entries."""

    name: str
    width: int


@dataclass(frozen=True)
class _Projected:
    """What one product makes of the block's input."""

    query_residual: ir.Value
    """[B, query_rank], normed."""
    latent: ir.Value
    """[B, D]"""
    vectors: list[ir.Value]
    """[B, series * width] of every compressor."""
    gates: list[ir.Value]
    index_weights: ir.Value | None
    """[B, index heads]"""


@dataclass(frozen=True)
class _Seen:
    """Rows that tokens attend to, [R, 1, n, D], and what is added to their scores, [R, Q, 1, n]."""

    rows: ir.Value
    bias: ir.Value


def attention(
    parts: Parts, layer: int, normed: ir.Value, caches: Caches, place: Place, committed: Halves | None = None
) -> tuple[ir.Value, Caches]:
    """(output [B, H], the caches after the new rows were written) of ``normed`` [B, H]

    ``committed``: latent rows that are written before those of ``normed``, as ``place.placement`` has it; without
    compression alone.
    """
    tape, decoder, name = parts.tape, parts.decoder, f"layers.{layer}.attn"
    heads, dim = decoder.attention.num_heads, decoder.attention.head_dim
    compression, turn = decoder.compressions[layer], place.rotations[decoder.layer_rope(layer)]
    series = _series(name, compression, dim)
    projected = _project(parts, name, compression, series, normed)
    query = parts.product(projected.query_residual, (f"{name}.wq_b",), decoder.query_rank)
    query = rotate(parts, parts.unit_norm(tape.reshape(query, (-1, heads, dim)), dim), dim, turn)
    halves = latent_halves(parts, layer, projected.latent, turn)
    if committed is not None:
        halves = Halves(
            tape.op("Concat", committed.first, halves.first, axis=0),
            tape.op("Concat", committed.second, halves.second, axis=0),
        )
    written = Caches(
        _write(parts, caches.keys, place, halves.first, projected.vectors),
        _write(parts, caches.values, place, halves.second, projected.gates),
    )
    widths = [dim // 2, *(_count(compression) * one.width for one in series)]
    first, *vectors = parts.split(written.keys, widths)
    second, *gates = parts.split(written.values, widths)
    seen = [_Seen(tape.op("Concat", first, second, axis=-1), place.window_bias)]
    if compression is not None:
        entries = [
            compress(parts, one.name, compression, one.width, *rows, place.entries[compression.rate])
            for one, rows in zip(series, zip(vectors, gates, strict=True), strict=True)
        ]
        seen.append(_seen_entries(parts, name, compression, entries, projected, turn, place))
    mixed = _attend(parts, name, query, seen, place)
    # Values were rotated with the keys they are; turned back, they depend on the distance alone.
    return _output(parts, name, rotate(parts, mixed, dim, turn, back=True)), written


def latent_halves(parts: Parts, layer: int, latent: ir.Value, turn: Rotation) -> Halves:
    """What a layer caches of projected latents [n, D]: normed, and rotated by their positions."""
    dim = parts.decoder.attention.head_dim
    rows = parts.tape.reshape(parts.norm(latent, f"layers.{layer}.attn.kv_norm", dim), (-1, 1, dim))
    return Halves(*parts.split(rotate(parts, rows, dim, turn), [dim // 2, dim // 2]))


def _project(
    parts: Parts, name: str, compression: Compression | None, series: list[_Series], normed: ir.Value
) -> _Projected:
    decoder, count = parts.decoder, len(series)
    names = [f"{name}.wq_a", f"{name}.wkv"]
    names += [f"{one.name}.{kind}" for kind in ("wkv", "wgate") for one in series]
    sizes = [decoder.query_rank, decoder.attention.head_dim]
    sizes += [_count(compression) * one.width for one in series] * 2
    if compression is not None and compression.indexer is not None:
        names.append(f"{name}.indexer.weights_proj")
        sizes.append(compression.indexer.heads)
    low, latent, *rest = parts.split(parts.product(normed, names, decoder.hidden_size), sizes)
    return _Projected(
        query_residual=parts.norm(low, f"{name}.q_norm", decoder.query_rank),
        latent=latent,
        vectors=rest[:count],
        gates=rest[count : 2 * count],
        index_weights=rest[2 * count] if len(rest) > 2 * count else None,
    )


def _seen_entries(
    parts: Parts,
    name: str,
    compression: Compression,
    entries: list[ir.Value],
    projected: _Projected,
    turn: Rotation,
    place: Place,
) -> _Seen:
    """``entries``: [R, T, .] of the layer's compressor and, where it has one, of its indexer's."""
    where = place.entries[compression.rate]
    if compression.indexer is None or projected.index_weights is None:
        added = bias(parts.dialect, where.ready)
    else:
        added = chosen_bias(
            parts, f"{name}.indexer", compression.indexer,
            projected.query_residual, projected.index_weights, entries[1], turn, where, place,
        )  # fmt: skip
    one, two = parts.tape.constant([1]), parts.tape.constant([2])
    return _Seen(parts.tape.op("Unsqueeze", entries[0], one), parts.tape.op("Unsqueeze", added, two))


def _count(compression: Compression | None) -> int:
    return 0 if compression is None else compression.series


def _series(name: str, compression: Compression | None, dim: int) -> list[_Series]:
    if compression is None:
        return []
    own = _Series(f"{name}.compressor", dim)
    if compression.indexer is None:
        return [own]
    return [own, _Series(f"{name}.indexer.compressor", compression.indexer.head_dim)]


def _write(parts: Parts, cache: ir.Value, place: Place, half: ir.Value, others: list[ir.Value]) -> ir.Value:
    """The cache with new rows: half a latent [B, 1, D / 2], then the others [B, .]."""
    tape = parts.tape
    if others:
        lifted = [tape.op("Unsqueeze", value, tape.constant([1])) for value in others]
        half = tape.op("Concat", half, *lifted, axis=-1)
    return parts.dialect.write(cache, place.placement, half)


def _attend(parts: Parts, name: str, query: ir.Value, seen: list[_Seen], place: Place) -> ir.Value:
    """[B, heads, D] -> [B, heads, D], over all that is seen and a sink a head, which takes weight and gives nothing."""
    tape, shape = parts.tape, parts.decoder.attention
    grid = tape.op("Gather", query, place.query_index, axis=0)  # [R, Q, heads, D]
    seen_scores = [tape.op("Add", scores(parts, grid, one.rows, shape.head_dim, shape.scale), one.bias) for one in seen]
    lengths = [tape.op("Shape", one.rows, start=2, end=3) for one in seen]
    sinks, count = _sinks(parts, name, lengths[1:], place)
    weights = tape.op("Softmax", tape.op("Concat", *seen_scores, sinks, axis=-1), axis=-1)
    sizes = tape.op("Concat", *lengths, count, axis=0)
    *shares, _ = tape.op("Split", weights, sizes, outputs=len(seen) + 1, axis=-1)
    # A product for each, so that a longer cache adds to the end of both sums alone.
    mixed, *others = [
        mixture_of_rows(parts, share, one.rows, shape.num_heads, shape.head_dim)
        for share, one in zip(shares, seen, strict=True)
    ]
    for other in others:
        mixed = tape.op("Add", mixed, other)
    back: ir.Value = tape.op("Gather", mixed, place.output_rows, axis=0)
    return back


def _sinks(parts: Parts, name: str, lengths: list[ir.Value], place: Place) -> tuple[ir.Value, ir.Value]:
    """(scores of the sinks [R, Q, heads, n], each the last of n, hugely negative before it; n, int64 [1])

    ``lengths``: int64 [1] of the entries that stand before them. They and the sinks fill blocks of 128: the kernel of
    softmax adds what is left behind the last whole block in another order.
    """
    tape, heads = parts.tape, parts.decoder.attention.num_heads
    before = tape.constant([_SOFTMAX_BLOCK - 1])
    for length in lengths:
        before = tape.op("Sub", before, tape.op("Mod", length, tape.constant([_SOFTMAX_BLOCK])))
    scores = parts.exact(f"{name}.attn_sink", (heads, 1), lambda stored: stored.reshape(-1, 1))
    shape = tape.op("Concat", tape.op("Shape", place.query_index), tape.constant([heads, 1]), axis=0)
    pads = tape.op("Concat", tape.constant([0] * 3), before, tape.constant([0] * 4), axis=0)
    hidden = tape.constant(MASKED, np.float32)
    return tape.op("Pad", tape.op("Expand", scores, shape), pads, hidden), tape.op("Add", before, tape.constant([1]))


def _output(parts: Parts, name: str, mixed: ir.Value) -> ir.Value:
    """Heads [B, heads, D] in groups to a low rank each, and all of these to [B, H]."""
    tape, decoder = parts.tape, parts.decoder
    groups, rank = decoder.output_groups, decoder.output_rank
    width = decoder.attention.num_heads * decoder.attention.head_dim // groups
    inputs = parts.split(tape.reshape(mixed, (-1, groups * width)), [width] * groups)
    low = [
        tape.op("MatMul", value, _group_weight(parts, f"{name}.wo_a.weight", group, width))
        for group, value in enumerate(inputs)
    ]
    joined = low[0] if groups == 1 else tape.op("Concat", *low, axis=1)
    return parts.product(joined, (f"{name}.wo_b",), groups * rank)


def _group_weight(parts: Parts, name: str, group: int, width: int) -> ir.Value:
    """[width, rank] of one group, stored as rows of [groups * rank, width]."""
    rank = parts.decoder.output_rank
    rows = slice(group * rank, (group + 1) * rank)
    return parts.tape.weight(f"{name}.{group}", (width, rank), lambda: parts.weights.read(name)[rows].T)
