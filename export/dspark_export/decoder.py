"""A decoder-only target model as data: what a family says about a checkpoint, and all that the graph builder reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts (the ``rope_type`` of a Hugging Face config)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()
    """kind ``factors``: one a channel pair, as GGUF files state them."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the whole head, in the half-split layout of Hugging Face checkpoints."""

    head_dim: int
    theta: float
    scaling: RopeScaling = RopeScaling()

    def inverse_frequencies(self) -> NDArray[Any]:
        """Angular frequency of each pair of channels, float32 [head_dim / 2], radians a position.

        ``llama3`` follows the reference of Llama 3.1: low frequencies divided by ``factor``, high ones kept, those
        between blended by how often they turn within the original context.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        inverse = (np.float32(1.0) / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        scaling = self.scaling
        if scaling.kind == "default":
            return inverse
        if scaling.kind == "linear":
            return (inverse / np.float32(scaling.factor)).astype(np.float32)
        if scaling.kind == "factors":
            return (inverse / np.asarray(scaling.divisors, dtype=np.float32)).astype(np.float32)
        if scaling.kind == "llama3":
            turns = scaling.original_max_position * inverse / (2 * np.pi)
            span = scaling.high_freq_factor - scaling.low_freq_factor
            keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
            return np.asarray(inverse / scaling.factor * (1 - keep) + inverse * keep, dtype=np.float32)
        raise ValueError(f"rope_type: expected default, linear, llama3 or factors, got {scaling.kind!r}")

    def tables(self, positions: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Cosines and sines of positions 0 .. positions-1, each float32 [positions, head_dim / 2]."""
        angles = np.outer(np.arange(positions, dtype=np.float32), self.inverse_frequencies())
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with rotary positions over the whole context."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    qk_norm: bool = False
    """An RMS norm on every query and key head, before the rotation (Qwen3)."""
    qkv_bias: bool = False
    output_bias: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"attention: expected num_attention_heads ({self.num_heads}) to be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )


@dataclass(frozen=True)
class Decoder:
    """A whole target model. Tensor names follow the Hugging Face layout of ``LlamaForCausalLM``."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    norm_eps: float
    attention: Attention
    tied_embedding: bool
    max_position: int
    mlp_bias: bool = False

    def default_taps(self) -> tuple[int, ...]:
        """Layers whose outputs a drafter reads when nobody says otherwise: five, spread from early to late.

        Never the last layer (DESIGN, "Features"); the released Qwen3 drafters take a similar spread.
        """
        count = min(5, self.num_layers - 1)
        if count <= 1:
            return (0,)
        first, last = min(1, self.num_layers - 2), max(self.num_layers - 3, 0)
        return tuple(sorted({round(first + (last - first) * i / (count - 1)) for i in range(count)}))
