"""Tiny random checkpoints of every family, made with transformers. Windows are far shorter than the test text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
LAYER_TYPES = [_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL]
_GEMMA: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": LAYER_TYPES,
    "sliding_window": 11,
    "head_dim": 8,
    "final_logit_softcapping": 3.0,
}
_GEMMA3_ROPE = {
    _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
}
_GEMMA4_ROPE = {
    _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000.0},
}
_GEMMA4 = _GEMMA | {
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": _GEMMA4_ROPE,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Recipe:
    """Names in transformers, and what the config says."""

    config_class: str
    model_class: str
    settings: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "llama3": Recipe("LlamaConfig", "LlamaForCausalLM", {"num_hidden_layers": 3, "rope_parameters": _LLAMA3}),
    "qwen3": Recipe("Qwen3Config", "Qwen3ForCausalLM", {"num_hidden_layers": 3, "head_dim": 16}),
    "gemma3": Recipe(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GEMMA | {"query_pre_attn_scalar": 24, "rope_parameters": _GEMMA3_ROPE},
    ),
    "gemma4": Recipe("Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA4),
    "gemma4_unified": Recipe(
        "Gemma4UnifiedTextConfig",
        "Gemma4UnifiedForCausalLM",
        {key: value for key, value in _GEMMA4.items() if key != "hidden_size_per_layer_input"},
    ),
    "gemma4, values of their own": Recipe(
        "Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA4 | {"attention_k_eq_v": False, "attention_bias": True}
    ),
}


def make(name: str, folder: Path, dtype: str = "float32", shard_size: str = "1GB", **changes: Any) -> Any:
    """Save a random model of a recipe and return it in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    recipe = RECIPES[name]
    torch.manual_seed(1)
    config = getattr(transformers, recipe.config_class)(**(_COMMON | recipe.settings | changes))
    model = getattr(transformers, recipe.model_class)(config)
    disturb(model)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.eval()


def disturb(model: Any) -> None:
    """Make what starts as zeros and ones random, since a mix-up would not show."""
    import torch

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "layer_scalar")) or "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
