"""A tiny DeepSeek-V4 with a random drafter inside, in the layout of released checkpoints, and that drafter in torch.

The reference is made of the layers of ``transformers``, fed as the checkpoints' own inference code feeds its stages: a
cache that hands them the window's latents before the block's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiny_deepseek_v4
import torch
from safetensors.numpy import load_file, save_file
from tiny_deepseek_v4 import SLIDING
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

BLOCK, STAGES, NOISE = 5, 3, 96
TAPS = (2, 3, 4)
WINDOW = 12
RENAMED = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


@dataclass(frozen=True)
class Block:
    """What the reference says of one block: [g, H], [g, V], [g, V], [g], [g]."""

    hidden: Tensor
    base_logits: Tensor
    draft_logits: Tensor
    confidence_logits: Tensor
    tokens: Tensor


class Reference:
    """The drafter in torch; ``entry`` and ``heads`` are what a stage has beside a decoder layer."""

    def __init__(self, target: Any, backbone: Any, entry: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        self._target, self._backbone = target, backbone
        self._entry, self._heads = entry, heads

    @torch.no_grad()
    def __call__(self, features: Tensor, anchor: int, start: int) -> Block:
        """The greedy block of ``anchor`` at position ``start``, behind ``features`` [start, F]."""
        model, embedding = self._backbone.model, self._target.model.embed_tokens.weight
        context = self._entry["main_proj.weight"] @ features[max(start - WINDOW, 0) : start].T
        context = torch.nn.functional.rms_norm(
            context.T, (len(embedding[0]),), self._entry["main_norm.weight"], model.config.rms_norm_eps
        )
        positions = torch.arange(start, start + BLOCK)[None]
        rotation = model.rotary_emb(embedding, position_ids=positions, layer_type="main")
        tokens = torch.tensor([anchor] + [NOISE] * (BLOCK - 1))
        streams = embedding[tokens][None, :, None].expand(-1, -1, model.config.hc_mult, -1).contiguous()
        for layer in model.layers:
            window = _Window(layer.self_attn, model.rotary_emb, context, start)
            streams = layer(
                streams, position_embeddings={"main": rotation}, position_ids=positions, attention_mask=None,
                cache=window,
            )  # fmt: skip
        joined = model.hc_head(streams)[0]
        hidden = model.norm(joined)
        base = hidden @ self._target.lm_head.weight.T
        previous, rows, confidence = anchor, [], []
        for slot in range(BLOCK):
            known = self._heads["markov_head.markov_w1.weight"][previous]
            rows.append(base[slot] + self._heads["markov_head.markov_w2.weight"] @ known)
            confidence.append(self._heads["confidence_head.proj.weight"][0] @ torch.cat([joined[slot], known]))
            previous = int(rows[-1].argmax())
        drafts = torch.stack(rows)
        return Block(hidden, base, drafts, torch.stack(confidence), drafts.argmax(dim=1))


class _Window:
    """Stands where attention keeps what it has seen: latents of the context, and nothing of the block stays."""

    def __init__(self, attention: Any, rotary: Any, context: Tensor, start: int) -> None:
        latents = attention.kv_norm(attention.kv_proj(context))[None, None]
        positions = torch.arange(start - len(context), start)[None]
        self._latents = apply_rotary_pos_emb(latents, *rotary(context, position_ids=positions, layer_type="main"))

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self._latents, keys], dim=2), torch.cat([self._latents, values], dim=2)


def make(folder: Path, known: Callable[[Any], list[list[int]]]) -> tuple[Any, Reference]:
    """Save target and drafter as one released checkpoint in ``folder / "model"``; (the target, the drafter).

    ``known``: texts of the target; the Markov head, random otherwise, knows by heart what follows each token there.
    """
    target = tiny_deepseek_v4.make(folder / "target")
    alike = {"layer_types": [SLIDING] * STAGES, "mlp_layer_types": ["moe"] * STAGES, "num_hidden_layers": STAGES}
    backbone = tiny_deepseek_v4.make(folder / "backbone", seed=4, **alike)
    backbone.config._attn_implementation = "eager"
    random, hidden, vocab = np.random.default_rng(5), target.config.hidden_size, target.config.vocab_size
    entry = {
        "main_proj.weight": _normal(random, 0.1, hidden, hidden * len(TAPS)),
        "main_norm.weight": 1 + _normal(random, 0.1, hidden),
    }
    drawn = {
        "markov_head.markov_w1.weight": np.eye(vocab, dtype=np.float32) + _normal(random, 0.1, vocab, vocab),
        "markov_head.markov_w2.weight": _normal(random, 0.5, vocab, vocab),
        "confidence_head.proj.weight": _normal(random, 0.3, 1, hidden + vocab),
    }
    for text in known(target):
        for before, after in pairwise(text):
            drawn["markov_head.markov_w2.weight"][after, before] = 30.0
    tensors = _read(folder / "target", lambda name: RENAMED.get(name, name.removeprefix("model.")))
    tensors |= _read(folder / "backbone", _stage_name)
    tensors |= {f"mtp.0.{name}": array for name, array in entry.items()}
    tensors |= {f"mtp.{STAGES - 1}.{name}": array for name, array in drawn.items()}
    (folder / "model").mkdir()
    save_file(tensors, folder / "model" / "model.safetensors")
    config = json.loads((folder / "target" / "config.json").read_text()) | {
        "dspark_block_size": BLOCK,
        "dspark_noise_token_id": NOISE,
        "dspark_target_layer_ids": list(TAPS),
        "dspark_markov_rank": vocab,
        # As released; it is not the number of stages.
        "num_nextn_predict_layers": 1,
    }
    (folder / "model" / "config.json").write_text(json.dumps(config))
    as_torch = [{name: torch.from_numpy(array) for name, array in some.items()} for some in (entry, drawn)]
    return target, Reference(target, backbone, *as_torch)


def _normal(random: np.random.Generator, scale: float, *shape: int) -> np.ndarray:
    return (scale * random.standard_normal(shape)).astype(np.float32)


def _read(folder: Path, rename: Any) -> dict[str, np.ndarray]:
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, array in load_file(shard).items():
            new = rename(name.replace(".attn.norm.", ".attn.kv_norm."))
            if new is not None:
                tensors[new] = array
    return tensors


def _stage_name(name: str) -> str | None:
    """The name in a stage of what a model of as many layers has; None for its embedding and LM head."""
    if name in ("model.embed_tokens.weight", "head.weight", "lm_head.weight"):
        return None
    if name in RENAMED:
        return f"mtp.{STAGES - 1}.{RENAMED[name]}"
    return name.replace("model.layers.", "mtp.", 1)
