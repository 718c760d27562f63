"""Tiny random Llama checkpoints, made with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def make(folder: Path, dtype: str = "float32", shard_size: str = "1GB", **changes: Any) -> Any:
    """Save a random ``LlamaForCausalLM`` and return it as float32 (with the values as stored)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 5,
    }
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # made as zeros and ones: a mix-up would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    if dtype == "float32":
        return model.eval()
    # Not model.float(): the conversion above rounded the rotary frequencies, too, which no file stores.
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, token_ids: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        found: np.ndarray = model(torch.tensor([token_ids])).logits[0].numpy()
    return found


def tokens(count: int = 60, vocab: int = 97) -> list[int]:
    return np.random.default_rng(2).integers(0, vocab, count).tolist()
