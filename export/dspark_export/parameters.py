"""How many numbers a model has, from its description alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dspark_export.decoder import Attention, Decoder
from dspark_export.drafter_spec import DrafterSpec

Reads = Literal["norm", "unbounded", "table"]


@dataclass(frozen=True)
class Matrix:
    """What one product multiplies with; products that are fused are one matrix."""

    inner: int
    width: int
    reads: Reads
    """``norm``: an RMS norm's output, which bounds fp8's scale. ``unbounded``: anything else. ``table``: looked up, or
    too small to be worth it; no precision but the compute dtype's."""

    @property
    def size(self) -> int:
        return self.inner * self.width


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model by what becomes of them."""

    matrices: tuple[Matrix, ...]
    """Of products: what fp8, int8 and int4 make smaller, as far as they can."""
    embedding: int
    head: int
    """LM head, or the embedding again where the two are tied: then it is in no file twice."""
    tied: bool
    other: int
    """Norms and biases."""

    @property
    def products(self) -> int:
        return sum(matrix.size for matrix in self.matrices)

    @property
    def total(self) -> int:
        """As a checkpoint stores them and as model cards count them."""
        return self.products + self.embedding + (0 if self.tied else self.head) + self.other


def count_target(decoder: Decoder) -> ParameterCount:
    """Parameters of a target model's language part."""
    table = decoder.vocab_size * decoder.hidden_size
    other = _layers_other(decoder) + decoder.hidden_size
    return ParameterCount(tuple(_layers(decoder)), table, table, decoder.tied_embedding, other)


def count_drafter(spec: DrafterSpec) -> ParameterCount:
    """Parameters of a drafter; embedding and head are the target's, copied into its checkpoint."""
    decoder, rank = spec.decoder, spec.markov_rank
    hidden, vocab = decoder.hidden_size, decoder.vocab_size
    matrices = [
        *_layers(decoder),
        features_matrix(spec),
        Matrix(vocab, rank, "table"),
        Matrix(rank, spec.draft_vocab_size, "unbounded"),
    ]
    other = _layers_other(decoder)
    if spec.head == "gated":
        matrices.append(Matrix(hidden + rank, rank, "table"))
        other += rank
    if spec.head == "rnn":
        matrices.append(Matrix(hidden + 2 * rank, 3 * rank, "table"))
        other += 3 * rank
    if spec.confidence:
        other += hidden + (rank if spec.confidence_with_markov else 0) + 1
    head = spec.draft_vocab_size * hidden
    return ParameterCount(tuple(matrices), vocab * hidden, head, False, other + 2 * hidden)


def context_matrices(spec: DrafterSpec) -> tuple[Matrix, ...]:
    """Of the context rows: fc, and the keys and values of all layers as one product of their own."""
    decoder = spec.decoder
    kinds = 1 if decoder.attention.keys_are_values else 2
    width = sum(kinds * heads * channels for heads, channels in decoder.cache_shapes)
    return features_matrix(spec), Matrix(decoder.hidden_size, width, "norm")


def features_matrix(spec: DrafterSpec) -> Matrix:
    """fc, of the target's features."""
    return Matrix(spec.feature_size, spec.decoder.hidden_size, "unbounded")


def _layers(decoder: Decoder) -> Iterator[Matrix]:
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    for attention in decoder.layer_attentions:
        queries, keys = _widths(attention)
        yield Matrix(hidden, queries + (1 if attention.keys_are_values else 2) * keys, "norm")
        yield Matrix(queries, hidden, "unbounded")
        yield Matrix(hidden, 2 * inner, "norm")
        yield Matrix(inner, hidden, "unbounded")


def _layers_other(decoder: Decoder) -> int:
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    other = 0
    for attention in decoder.layer_attentions:
        queries, keys = _widths(attention)
        other += (4 if decoder.branch_norms else 2) * hidden + int(decoder.layer_scalar)
        other += 2 * attention.head_dim if attention.qk_norm else 0
        other += queries + 2 * keys if attention.qkv_bias else 0
        other += hidden if attention.output_bias else 0
        other += 2 * inner + hidden if decoder.mlp_bias else 0
    return other


def _widths(attention: Attention) -> tuple[int, int]:
    """Channels of queries, and of keys."""
    return attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
