"""How many numbers a model has, from its description alone."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_export.decoder import Attention, Decoder
from dspark_export.drafter_spec import DrafterSpec


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model by what becomes of them."""

    products: int
    """Matrices of products inside the layers: what fp8, int8 and int4 make smaller."""
    embedding: int
    head: int
    """LM head, or the embedding again where the two are tied: then it is in no file twice."""
    tied: bool
    other: int
    """Norms and biases."""

    @property
    def total(self) -> int:
        """As a checkpoint stores them and as model cards count them."""
        return self.products + self.embedding + (0 if self.tied else self.head) + self.other


def count_target(decoder: Decoder) -> ParameterCount:
    """Parameters of a target model's language part."""
    products, other = _layers(decoder)
    table = decoder.vocab_size * decoder.hidden_size
    return ParameterCount(products, table, table, decoder.tied_embedding, other + decoder.hidden_size)


def count_drafter(spec: DrafterSpec) -> ParameterCount:
    """Parameters of a drafter; embedding and head are the target's, copied into its checkpoint."""
    decoder, rank = spec.decoder, spec.markov_rank
    products, other = _layers(decoder)
    hidden, vocab = decoder.hidden_size, decoder.vocab_size
    products += hidden * spec.feature_size + rank * (vocab + spec.draft_vocab_size)
    if spec.head == "gated":
        products += rank * (hidden + rank)
        other += rank
    if spec.head == "rnn":
        products += 3 * rank * (hidden + 2 * rank)
        other += 3 * rank
    if spec.confidence:
        other += hidden + (rank if spec.confidence_with_markov else 0) + 1
    head = spec.draft_vocab_size * hidden
    return ParameterCount(products, vocab * hidden, head, False, other + 2 * hidden)


def _layers(decoder: Decoder) -> tuple[int, int]:
    """Products and the rest, of all layers."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    products = other = 0
    for attention in decoder.layer_attentions:
        products += _attention(attention, hidden) + 3 * hidden * inner
        other += (4 if decoder.branch_norms else 2) * hidden + int(decoder.layer_scalar)
        queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        other += 2 * attention.head_dim if attention.qk_norm else 0
        other += queries + 2 * keys if attention.qkv_bias else 0
        other += hidden if attention.output_bias else 0
        other += 2 * inner + hidden if decoder.mlp_bias else 0
    return products, other


def _attention(attention: Attention, hidden: int) -> int:
    pairs = 1 if attention.keys_are_values else 2
    heads = 2 * attention.num_heads + pairs * attention.num_kv_heads
    return heads * attention.head_dim * hidden
