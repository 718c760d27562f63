"""A layer of the torch drafter: attention over context rows and the block itself, and an MLP.

T context rows, A blocks of g slots, Hq query heads, Hkv key/value heads, D channels a head, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark_export.decoder import Attention, Decoder


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of rotary positions, [..., 1, D] each: one for all heads, half-split layout."""

    cosines: Tensor
    sines: Tensor

    @classmethod
    def at(cls, positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype, amplitude: float) -> Rotation:
        """For int64 ``positions`` of any shape."""
        angles = positions[..., None].float() * inverse_frequencies.to(positions.device)
        both = torch.cat([angles, angles], dim=-1)[..., None, :]
        return cls((both.cos() * amplitude).to(dtype), (both.sin() * amplitude).to(dtype))

    def apply(self, heads: Tensor) -> Tensor:
        """Rotate [..., heads, D]."""
        low, high = heads.chunk(2, dim=-1)
        return heads * self.cosines + torch.cat([-high, low], dim=-1) * self.sines


@dataclass(frozen=True)
class TextBlocks:
    """The blocks of one of several texts that are packed one after another."""

    blocks: slice
    """Of the A blocks."""
    rows: slice
    """Of the T context rows: up to the last one that any of the blocks sees."""
    visible: Tensor
    """bool [blocks, rows]: what each may look at."""


@dataclass(frozen=True)
class ContextKeys:
    """The committed rows, from which every layer takes keys and values."""

    context: Tensor
    """[T, H]: c = RMSNorm(fc(features)); no layer norms it again."""
    rotation: Rotation
    texts: Sequence[TextBlocks]
    """Together they hold all blocks, in order."""
    positions: Tensor
    """int64 [T]"""
    starts: Tensor
    """int64 [A]: positions of the blocks' anchors."""

    def visible(self, text: TextBlocks, window: int | None) -> Tensor:
        """bool [blocks, rows]: what blocks may look at through a sliding window."""
        if window is None:
            return text.visible
        return text.visible & (self.positions[text.rows] >= self.starts[text.blocks][:, None] - window)


def _parts(rows: Tensor, wanted: Sequence[slice]) -> list[Tensor]:
    """Ascending slices of [N, ...], from one split: backwards, each slice by itself would add a gradient of all N."""
    sizes, at = [], 0
    for part in wanted:
        start, stop, _ = part.indices(len(rows))
        sizes += [start - at, stop - start]
        at = stop
    return list(torch.split(rows, [*sizes, len(rows) - at])[1::2])


class DrafterAttention(nn.Module):
    """Grouped-query attention of block slots over context rows and their own block."""

    def __init__(self, hidden_size: int, attention: Attention, norm_eps: float, causal: bool) -> None:
        """``causal``: slots see none of those behind them."""
        super().__init__()
        self._shape, self._causal = attention, causal
        queries = attention.num_heads * attention.head_dim
        keys = attention.num_kv_heads * attention.head_dim
        self.q_proj = nn.Linear(hidden_size, queries, bias=attention.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias=attention.qkv_bias)
        if not attention.keys_are_values:
            self.v_proj = nn.Linear(hidden_size, keys, bias=attention.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden_size, bias=attention.output_bias)
        if attention.qk_norm:
            self.q_norm: nn.Module = nn.RMSNorm(attention.head_dim, norm_eps)
            self.k_norm: nn.Module = nn.RMSNorm(attention.head_dim, norm_eps)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.v_norm: nn.Module = nn.Identity()
        if attention.value_norm:
            self.v_norm = nn.RMSNorm(attention.head_dim, norm_eps, elementwise_affine=False)

    def _heads(self, projected: Tensor) -> Tensor:
        """[..., heads * D] -> [..., heads, D]"""
        dim = self._shape.head_dim
        return projected.reshape(*projected.shape[:-1], projected.shape[-1] // dim, dim)

    def _keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """[..., Hkv, D] each."""
        key = self._heads(self.k_proj(x))
        value = key if self._shape.keys_are_values else self._heads(self.v_proj(x))
        return rotation.apply(self.k_norm(key)), self.v_norm(value)

    def forward(self, x: Tensor, rotation: Rotation, keys: ContextKeys) -> Tensor:
        """[A, g, H] -> [A, g, H]."""
        query = rotation.apply(self.q_norm(self._heads(self.q_proj(x))))
        query = query.reshape(*x.shape[:2], self._shape.num_kv_heads, self._shape.group, self._shape.head_dim)
        context_key, context_value = self._keys_values(keys.context, keys.rotation)
        block_key, block_value = self._keys_values(x, rotation)
        blocks, rows = [text.blocks for text in keys.texts], [text.rows for text in keys.texts]
        mixed = torch.cat(
            [
                self._attend(mine, on_context, on_block, keys.visible(text, self._shape.window))
                for text, mine, on_context, on_block in zip(
                    keys.texts,
                    _parts(query, blocks),
                    zip(_parts(context_key, rows), _parts(context_value, rows), strict=True),
                    zip(_parts(block_key, blocks), _parts(block_value, blocks), strict=True),
                    strict=True,
                )
            ]
        )
        projected: Tensor = self.o_proj(mixed.flatten(2))
        return projected

    def _attend(
        self, query: Tensor, context: tuple[Tensor, Tensor], block: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """[A, g, Hkv, group, D] of queries of that shape, over the rows of one text and each over its own block."""
        # Two products instead of one with a mask: blocks never see each other, and there may be hundreds of them.
        on_context = torch.einsum("aqhnd,thd->ahnqt", query, context[0])
        on_context = on_context.masked_fill(~visible[:, None, None, None, :], float("-inf"))
        on_block = torch.einsum("aqhnd,akhd->ahnqk", query, block[0])
        if self._causal:
            later = torch.ones(on_block.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            on_block = on_block.masked_fill(later, float("-inf"))
        scores = torch.cat([on_context, on_block], dim=-1) * self._shape.scale
        weights, length = scores.softmax(dim=-1), visible.shape[1]
        mixed = torch.einsum("ahnqt,thd->aqhnd", weights[..., :length], context[1])
        return mixed + torch.einsum("ahnqk,akhd->aqhnd", weights[..., length:], block[1])


class DrafterMlp(nn.Module):
    """down(activation(gate(x)) * up(x))"""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        hidden, inner = decoder.hidden_size, decoder.intermediate_size
        self._silu = decoder.activation == "silu"
        self.gate_proj = nn.Linear(hidden, inner, bias=decoder.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=decoder.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=decoder.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        active = nn.functional.silu(gate) if self._silu else nn.functional.gelu(gate, approximate="tanh")
        mixed: Tensor = self.down_proj(active * self.up_proj(x))
        return mixed


class DrafterLayer(nn.Module):
    """Pre-norm attention and MLP, both residual; in Gemma's layout, their outputs are normed as well."""

    layer_scalar: Tensor

    def __init__(self, decoder: Decoder, attention: Attention, causal: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
        self.self_attn = DrafterAttention(decoder.hidden_size, attention, decoder.norm_eps, causal)
        self.post_attention_layernorm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
        self.mlp = DrafterMlp(decoder)
        self._branch_norms, self._scaled = decoder.branch_norms, decoder.layer_scalar
        if decoder.branch_norms:
            self.pre_feedforward_layernorm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
            self.post_feedforward_layernorm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
        if decoder.layer_scalar:
            self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, rotation: Rotation, keys: ContextKeys) -> Tensor:
        """[A, g, H] -> [A, g, H]."""
        attended = self.self_attn(self.input_layernorm(x), rotation, keys)
        if self._branch_norms:
            x = x + self.post_attention_layernorm(attended)
            x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
            return x * self.layer_scalar if self._scaled else x
        x = x + attended
        mixed: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return mixed
