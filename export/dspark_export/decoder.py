"""A decoder-only target model as data: what a family says about a checkpoint, and all that the graph builder reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    """kind ``factors``: what each channel pair's frequency is divided by, as GGUF files and YaRN have it."""
    amplitude: float = 1.0
    """What cosines and sines are multiplied by: YaRN's attention factor."""
    rotated: float = 1.0
    """kind ``proportional``: the share of the head's channel pairs that turns; the others keep still (Gemma 4)."""


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
        if scaling.kind == "proportional":
            turning = np.arange(len(inverse)) < int(scaling.rotated * self.head_dim // 2)
            return np.where(turning, inverse / np.float32(scaling.factor), 0.0).astype(np.float32)
        if scaling.kind == "factors":
            return (inverse / np.asarray(scaling.divisors, dtype=np.float32)).astype(np.float32)
        if scaling.kind == "llama3":
            turns = scaling.original_max_position * inverse / (2 * np.pi)
            span = scaling.high_freq_factor - scaling.low_freq_factor
            keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
            return np.asarray(inverse / scaling.factor * (1 - keep) + inverse * keep, dtype=np.float32)
        raise ValueError(f"rope_type: expected default, linear, llama3, proportional or factors, got {scaling.kind!r}")

    def tables(self, positions: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Cosines and sines of positions 0 .. positions-1, times the amplitude, each float32
        [positions, head_dim / 2]."""
        angles = np.outer(np.arange(positions, dtype=np.float32), self.inverse_frequencies())
        amplitude = np.float32(self.scaling.amplitude)
        return (np.cos(angles) * amplitude).astype(np.float32), (np.sin(angles) * amplitude).astype(np.float32)


def _require_counts(**sizes: object) -> None:
    """Raise ValueError, with the name that a config has for it, for a size that is no whole number from 1."""
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{key}: expected a whole number from 1, got {size!r}")


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention of a layer, with rotary positions."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    qk_norm: bool = False
    """An RMS norm on every query and key head, before the rotation (Qwen3, Gemma)."""
    qkv_bias: bool = False
    output_bias: bool = False
    value_norm: bool = False
    """An RMS norm without weight on every value head (Gemma 4)."""
    keys_are_values: bool = False
    """There is no value projection: values are the projected keys before their norm and rotation (Gemma 4)."""
    window: int | None = None
    """A token sees itself and so many tokens less one before it; None: all before it. The cache keeps every row."""
    fixed_scale: float | None = None
    """What scores are multiplied by; None: head_dim ** -0.5."""

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5) if self.fixed_scale is None else self.fixed_scale

    def __post_init__(self) -> None:
        _require_counts(
            num_attention_heads=self.num_heads, num_key_value_heads=self.num_kv_heads, head_dim=self.head_dim
        )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, of which pairs turn, got {self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"sliding_window: expected at least 1, got {self.window}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"attention: expected num_attention_heads ({self.num_heads}) to be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )


@dataclass(frozen=True)
class Decoder:
    """A whole target model. Tensor names follow the Hugging Face layout of ``LlamaForCausalLM``.

    Raises:
        ValueError: a size is no number from 1, ``attentions`` are not one a layer, or their query heads differ in
            number.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    norm_eps: float
    attention: Attention
    """Of every layer, unless ``attentions`` says otherwise."""
    tied_embedding: bool
    max_position: int
    mlp_bias: bool = False
    attentions: tuple[Attention, ...] = ()
    """One a layer, where layers differ; ``attention`` is then the first."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the MLP's gate."""
    norm_offset: bool = False
    """RMS norms multiply by 1 + weight (Gemma 3) instead of weight."""
    branch_norms: bool = False
    """The outputs of attention and MLP are normed before they are added to the residual stream: four norms a layer
    (Gemma). ``post_attention_layernorm`` is then one of these, and ``pre_feedforward_layernorm`` stands before the
    MLP."""
    layer_scalar: bool = False
    """The residual stream is multiplied by a number of the checkpoint after each layer (Gemma 4)."""
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    """Logits become cap * tanh(logits / cap)."""

    def __post_init__(self) -> None:
        _require_counts(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            max_position_embeddings=self.max_position,
        )
        if not isinstance(self.norm_eps, float | int) or not self.norm_eps > 0:
            raise ValueError(f"rms_norm_eps: expected a number above 0, got {self.norm_eps!r}")
        if self.logit_cap is not None and (not isinstance(self.logit_cap, float | int) or not self.logit_cap > 0):
            raise ValueError(f"final_logit_softcapping: expected a number above 0, got {self.logit_cap!r}")
        if self.attentions and len(self.attentions) != self.num_layers:
            raise ValueError(f"layer_types: expected {self.num_layers} layers, got {len(self.attentions)}")
        if len({attention.num_heads for attention in self.attentions}) > 1:
            raise ValueError("num_attention_heads: expected the same in every layer")

    def layer_attention(self, layer: int) -> Attention:
        """The attention of a layer."""
        return self.attentions[layer] if self.attentions else self.attention

    @property
    def layer_attentions(self) -> tuple[Attention, ...]:
        """One a layer."""
        return self.attentions or (self.attention,) * self.num_layers

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(key/value heads, channels a head) of every layer's cache."""
        return tuple((attention.num_kv_heads, attention.head_dim) for attention in self.layer_attentions)

    @property
    def last_tap(self) -> int:
        """The last layer that a drafter may read: never the last layer of all (DESIGN, "Features")."""
        return self.num_layers - 2

    def default_taps(self) -> tuple[int, ...]:
        """Layers whose outputs a drafter reads when nobody says otherwise: five, spread from early to late.

        Never the last layer (DESIGN, "Features"); the released Qwen3 drafters take a similar spread.
        """
        count = min(5, self.num_layers - 1)
        if count <= 1:
            return (0,)
        first, last = min(1, self.num_layers - 2), max(self.num_layers - 3, 0)
        return tuple(sorted({round(first + (last - first) * i / (count - 1)) for i in range(count)}))
