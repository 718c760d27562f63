"""What the TensorRT engines of verifier and drafter take and give: names, shapes, dtypes and optimization profiles.

The exporter builds graphs and engines to it, the runtime binds buffers by it. Dimensions that vary are symbols:

    B  tokens of a verification step          M  context rows of a drafting round
    N  rows that want logits                  D  drafting requests (a block each)
    R  cache rows in view: neighbouring slots, whose first is where the cache's address points
    Q  most tokens of one request             W  most rows that one request writes
    C  cached positions in view: how far attention looks, a multiple of what the runtime likes

**K/V.** A cache is ``[R, Hkv, capacity, D]``; ``capacity`` is fixed when the graph is exported (TensorRT's cache update
wants a static length). Input ``x`` and output ``x_out`` of a cache **must be bound to the same address**: rows are
written in place, before attention reads them. A step writes, for every row r in view, the W (verifier: Q) rows that
``update_index[r]`` (verifier: ``query_index[r]``) names, at positions ``write_starts[r] ..``. What lies beyond a
request's own rows is overwritten before it is ever visible. So ``write_starts[r] + W <= capacity`` must hold: the
capacity is ``max_context`` and ``padding`` more, and rows of view that take no part write at ``capacity - W``, into the
padding, which nobody reads. Caches start as zeros: a masked position has weight 0, and 0 times NaN is NaN.

**Shared weights.** Token embedding and LM head are inputs of both engines, bound to one copy on the device (the bytes
of ``artifact.embedding`` and ``artifact.head``, which are stored in the compute dtype; tied ones to one address). For a
model of 8B that spares 2.5 GB of device memory. A drafter with a reduced vocabulary takes rows ``d2t`` of the head.

**Sampling.** ``sampler.engine`` runs behind the verifier, on its logits where they lie, in steps that draw tokens for
somebody. It ranks them: what is read of a row to draw from it are the most probable tokens, and not the vocabulary.

No dimension may be 0: where no row is wanted (N, M), pass one of zeros, and ignore what comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD

VERIFIER_ENGINE = "verifier.engine"
SAMPLER_ENGINE = "sampler.engine"
DRAFT_ENGINE = "draft.engine"
CONTEXT_ENGINE = "context.engine"

MAX_RANKED = 512
"""Tokens of a row that are ranked for a draw: more than nucleus and top-k leave as a rule, and 6 KiB to read."""

DType = Literal["int64", "float32", "float16", "bfloat16"]
Direction = Literal["input", "output"]

COMPUTE_DTYPES: Mapping[str, DType] = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp8": "bfloat16",
    "int4": "bfloat16",
    "float32": "float32",
}
"""What an artifact's ``dtype`` computes in between its products. float32 is for checks on a CPU."""


@dataclass(frozen=True)
class Range:
    """Values a dimension may take, and the one that kernels are chosen for."""

    low: int
    best: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.best <= self.high:
            raise ValueError(f"range: expected 1 <= low <= best <= high, got {self.low}, {self.best}, {self.high}")

    def holds(self, value: int) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Profile:
    """An optimization profile: a range for each symbol. Its index is its place in the engine."""

    name: str
    ranges: Mapping[str, Range]

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether these sizes, by symbol, may run with it."""
        return all(self.ranges[symbol].holds(size) for symbol, size in sizes.items())


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an engine."""

    name: str
    dtype: DType
    dims: tuple[int | str, ...]
    """A number, or the symbol of a dimension that varies."""
    direction: Direction = "input"
    alias: str | None = None
    """For the output of a cache: the input whose address it must be bound to."""

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape for given sizes by symbol."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.dims)


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of a layer."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class VerifierTensors:
    """The tensors of ``verifier.engine``."""

    compute: DType
    vocab_size: int
    hidden_size: int
    num_taps: int
    capacity: int
    caches: Sequence[CacheShape]
    """One a layer that has a cache of its own."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All of them, inputs first."""
        features = self.num_taps * self.hidden_size
        return (
            TensorSpec("input_ids", "int64", ("B",)),
            TensorSpec("positions", "int64", ("B",)),
            TensorSpec("rows", "int64", ("B",)),
            TensorSpec("columns", "int64", ("B",)),
            TensorSpec("query_index", "int64", ("R", "Q")),
            TensorSpec("logit_rows", "int64", ("N",)),
            TensorSpec("write_starts", "int64", ("R",)),
            TensorSpec("key_positions", "int64", ("C",)),
            TensorSpec(SHARED_EMBEDDING, self.compute, (self.vocab_size, self.hidden_size)),
            TensorSpec(SHARED_HEAD, self.compute, (self.vocab_size, self.hidden_size)),
            *cache_inputs(self.caches, self.compute, self.capacity),
            TensorSpec("logits", "float32", ("N", self.vocab_size), "output"),
            TensorSpec("argmax", "int64", ("N",), "output"),
            TensorSpec("top_logit", "float32", ("N",), "output"),
            TensorSpec("features", "float32", ("B", features), "output"),
            *cache_outputs(self.caches, self.compute, self.capacity),
        )


@dataclass(frozen=True)
class SamplerTensors:
    """The tensors of ``sampler.engine``. ``logits`` is the verifier's output, bound to the same address. Symbol N."""

    vocab_size: int

    @property
    def num_ranked(self) -> int:
        """Tokens of a row that are ranked."""
        return min(MAX_RANKED, self.vocab_size)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """``ranked_logits`` are the largest of a row, descending; equal ones, and which of them is the last, in any
        order. ``exp_sum`` is sum(exp((logits - largest) / temperature)) over the whole row."""
        return (
            TensorSpec("logits", "float32", ("N", self.vocab_size)),
            TensorSpec("temperature", "float32", ("N",)),
            TensorSpec("ranked_ids", "int64", ("N", self.num_ranked), "output"),
            TensorSpec("ranked_logits", "float32", ("N", self.num_ranked), "output"),
            TensorSpec("exp_sum", "float32", ("N",), "output"),
        )


@dataclass(frozen=True)
class DrafterTensors:
    """The tensors of ``draft.engine`` and ``context.engine``. ``features`` is what the verifier gave, on the device.

    The rows that a round may write are numbered 0 .. M-1 for its context and M .. M + D*g - 1 for its blocks (slot k
    of drafting request i is M + i*g + k); ``update_index`` names them for every cache row: the request's context
    rows, and, where it drafts, its block right behind them, written from ``write_starts`` = the first of these
    positions. ``query_index`` [R, g] has, as in the verifier, the block token (i*g + k) of each row and slot.
    ``context_positions`` serve the rotation alone.
    """

    compute: DType
    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    num_taps: int
    capacity: int
    caches: Sequence[CacheShape]
    block_size: int
    num_candidates: int

    @property
    def context_specs(self) -> tuple[TensorSpec, ...]:
        """Of ``context.engine``: context rows go into the cache, nothing is drafted. Symbols M, R, W."""
        return (
            TensorSpec("features", "float32", ("M", self.num_taps * self.hidden_size)),
            TensorSpec("context_positions", "int64", ("M",)),
            TensorSpec("update_index", "int64", ("R", "W")),
            TensorSpec("write_starts", "int64", ("R",)),
            *cache_inputs(self.caches, self.compute, self.capacity),
            *cache_outputs(self.caches, self.compute, self.capacity),
        )

    @property
    def draft_specs(self) -> tuple[TensorSpec, ...]:
        """Of ``draft.engine``. Symbols M, D, R, W, C."""
        block, candidates = self.block_size, self.num_candidates
        context = [spec for spec in self.context_specs if not spec.name.startswith(("key_cache", "value_cache"))]
        return (
            *context,
            TensorSpec("anchors", "int64", ("D",)),
            TensorSpec("block_rows", "int64", ("D",)),
            TensorSpec("starts", "int64", ("D",)),
            TensorSpec("query_index", "int64", ("R", block)),
            TensorSpec("key_positions", "int64", ("C",)),
            TensorSpec("uniforms", "float32", ("D", block)),
            TensorSpec("temperature", "float32", ("D",)),
            TensorSpec("top_k", "int64", ("D",)),
            TensorSpec("top_p", "float32", ("D",)),
            TensorSpec("min_p", "float32", ("D",)),
            TensorSpec(SHARED_EMBEDDING, self.compute, (self.vocab_size, self.hidden_size)),
            TensorSpec(SHARED_HEAD, self.compute, (self.draft_vocab_size, self.hidden_size)),
            *cache_inputs(self.caches, self.compute, self.capacity),
            TensorSpec("tokens", "int64", ("D", block), "output"),
            TensorSpec("candidates", "int64", ("D", block, candidates), "output"),
            TensorSpec("probabilities", "float32", ("D", block, candidates), "output"),
            TensorSpec("confidence_logits", "float32", ("D", block), "output"),
            *cache_outputs(self.caches, self.compute, self.capacity),
        )


def cache_inputs(caches: Sequence[CacheShape], compute: DType, capacity: int) -> list[TensorSpec]:
    """``key_cache_i`` and ``value_cache_i`` of every layer i."""
    return [
        TensorSpec(f"{kind}_cache_{layer}", compute, ("R", cache.num_kv_heads, capacity, cache.head_dim))
        for layer, cache in enumerate(caches)
        for kind in ("key", "value")
    ]


def cache_outputs(caches: Sequence[CacheShape], compute: DType, capacity: int) -> list[TensorSpec]:
    """``key_cache_i_out`` and ``value_cache_i_out``, which alias the inputs."""
    return [
        TensorSpec(f"{spec.name}_out", spec.dtype, spec.dims, "output", alias=spec.name)
        for spec in cache_inputs(caches, compute, capacity)
    ]


@dataclass(frozen=True)
class Workload:
    """What the default profiles are made for."""

    max_context: int
    slots: int = 16
    """Most requests at a time."""
    block_size: int = 7
    """Most drafts of a request in a round."""
    prefill_chunk: int = 512
    """Most prompt tokens of a request in a step."""

    @property
    def padding(self) -> int:
        """Positions that a cache has beyond the context, for rows that nobody reads."""
        return self.prefill_chunk + self.block_size

    @property
    def capacity(self) -> int:
        """Static length of every cache."""
        return self.max_context + self.padding

    def view(self) -> Range:
        """Of C."""
        return Range(1, min(1024, self.max_context), self.max_context + self.block_size)

    def verifier_profiles(self) -> tuple[Profile, ...]:
        """Verification by token count, from one request to all of them, then prefill; the first that holds is it."""
        deepest = self.block_size + 1
        rows, view, profiles = Range(1, min(4, self.slots), self.slots), self.view(), []
        most = self.slots * deepest
        for tokens in self._verified():
            tokens_range = Range(1, tokens, tokens)
            ranges = {"B": tokens_range, "N": tokens_range, "R": rows, "Q": Range(1, deepest, deepest), "C": view}
            profiles.append(Profile(f"verify_{tokens}", ranges))
        chunk = self.prefill_chunk
        mixed = chunk + most
        columns = Range(1, chunk, chunk)
        prefill = {"B": Range(1, chunk, mixed), "N": Range(1, 1, most), "R": Range(1, 1, self.slots), "Q": columns}
        return (*profiles, Profile("prefill", prefill | {"C": view}))

    def sampler_profiles(self) -> tuple[Profile, ...]:
        """Of the rows that verifications want."""
        return tuple(Profile(f"sample_{tokens}", {"N": Range(1, tokens, tokens)}) for tokens in self._verified())

    def draft_profiles(self) -> tuple[Profile, ...]:
        """A drafting round after a verification, then one that takes a prompt's chunk along."""
        deepest, rows = self.block_size + 1, Range(1, min(4, self.slots), self.slots)
        most = self.slots * deepest
        common = {"D": rows, "R": rows, "C": self.view()}
        round_ranges = {"M": Range(1, min(4, self.slots) * deepest, most), "W": Range(1, deepest + self.block_size,
                        deepest + self.block_size)}  # fmt: skip
        chunk = self.prefill_chunk
        prompt = {"M": Range(1, chunk, chunk + most), "W": Range(1, self.padding, self.padding)}
        return Profile("draft", common | round_ranges), Profile("draft_prompt", common | prompt)

    def context_profiles(self) -> tuple[Profile, ...]:
        """Of a prompt's chunks."""
        chunk, most = self.prefill_chunk, self.slots * (self.block_size + 1)
        rows, columns = Range(1, 1, self.slots), Range(1, chunk, chunk)
        return (Profile("context", {"M": Range(1, chunk, chunk + most), "R": rows, "W": columns}),)

    def _verified(self) -> list[int]:
        """Most tokens of one request, of a few and of all of them, each with its drafts."""
        deepest = self.block_size + 1
        most = self.slots * deepest
        return sorted({min(most, size) for size in (deepest, 4 * deepest, most)})
