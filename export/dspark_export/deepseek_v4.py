"""DeepSeek-V4 as data: what its graph reads beyond a plain :class:`~dspark_export.decoder.Decoder`."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_export.decoder import Decoder, Rope


@dataclass(frozen=True)
class Indexer:
    """Scores the compressed entries of a layer; a token attends to the best ``top_k`` of them."""

    heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True)
class Compression:
    """Entries that stand for ``rate`` positions each, beside the sliding window."""

    rate: int
    indexer: Indexer | None
    """Of compressed sparse attention, whose entries also reach into the ``rate`` positions before theirs; None for
    heavily compressed attention, where all entries are seen."""

    @property
    def series(self) -> int:
        """Vectors that a position contributes: one to its entry and, where entries overlap, one to the next."""
        return 1 if self.indexer is None else 2


@dataclass(frozen=True)
class Experts:
    """Mixture of experts with one shared expert of the same size."""

    count: int
    chosen: int
    """A token."""
    scale: float
    """What the normalised weights of the chosen are multiplied by."""
    limit: float
    """Gates are clipped from above, up projections on both sides."""


@dataclass(frozen=True)
class HyperConnections:
    """Residual streams, and how the matrices that mix them are made doubly stochastic."""

    streams: int
    iterations: int
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class DeepSeekV4(Decoder):
    """A DeepSeek-V4 target. ``attention`` has the plain rotation, of the last ``rope_dim`` channels of a head.

    Raises:
        ValueError: sizes do not fit together.
    """

    query_rank: int
    rope_dim: int
    compressed_rope: Rope
    """Of layers with compression: queries, latent rows and entries."""
    output_groups: int
    output_rank: int
    """Of each group."""
    compressions: tuple[Compression | None, ...]
    """One a layer; None for sliding attention alone."""
    hash_routed: tuple[bool, ...]
    """One a layer: whether a table over token ids chooses the experts."""
    experts: Experts
    hyper: HyperConnections
    drafter_taps: tuple[int, ...] = ()
    """Layers that the drafter inside the checkpoint reads; empty where it has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, dim = self.attention.num_heads, self.attention.head_dim
        for name, found in (("layer_types", self.compressions), ("mlp_layer_types", self.hash_routed)):
            if len(found) != self.num_layers:
                raise ValueError(f"{name}: expected {self.num_layers} layers, got {len(found)}")
        if dim % 2 or self.rope_dim % 2 or not 2 <= self.rope_dim <= dim:
            raise ValueError(f"qk_rope_head_dim: expected an even part of head_dim ({dim}), got {self.rope_dim}")
        if (heads * dim) % self.output_groups:
            raise ValueError(f"o_groups: expected a divisor of {heads} heads x {dim}, got {self.output_groups}")
        if not 1 <= self.experts.chosen <= self.experts.count:
            raise ValueError(
                f"num_experts_per_tok: expected 1 to n_routed_experts ({self.experts.count}), got {self.experts.chosen}"
            )
        if min(self.hyper.streams, self.hyper.iterations) < 1:
            raise ValueError("hc_mult, hc_sinkhorn_iters: expected at least 1")
        for compression in self.compressions:
            if compression is not None and compression.rate < 1:
                raise ValueError(f"compress_rates: expected at least 1, got {compression.rate}")
            indexer = None if compression is None else compression.indexer
            if indexer is not None and indexer.head_dim < self.rope_dim:
                raise ValueError(
                    f"index_head_dim: expected at least qk_rope_head_dim ({self.rope_dim}), got {indexer.head_dim}"
                )
            if indexer is not None and min(indexer.top_k, indexer.heads) < 1:
                raise ValueError("index_topk, index_n_heads: expected at least 1")

    def layer_rope(self, layer: int) -> Rope:
        """The rotation of a layer."""
        return self.attention.rope if self.compressions[layer] is None else self.compressed_rope

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """One row a position: half of the latent, then what compression needs of the position. The key cache has the
        vectors, the value cache their gates, which are as wide."""
        latent = self.attention.head_dim
        shapes = []
        for compression in self.compressions:
            width = latent // 2
            if compression is not None:
                width += compression.series * latent
                if compression.indexer is not None:
                    width += compression.series * compression.indexer.head_dim
            shapes.append((1, width))
        return tuple(shapes)

    @property
    def last_tap(self) -> int:
        """The drafters inside these checkpoints read the last layer too, unlike all others."""
        return self.num_layers - 1

    def default_taps(self) -> tuple[int, ...]:
        return self.drafter_taps or super().default_taps()
