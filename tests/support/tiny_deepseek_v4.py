"""A tiny random DeepSeek-V4 of all kinds of layers, made with transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
SETTINGS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 20,
    "o_groups": 2,
    "o_lora_rank": 8,
    "layer_types": [SLIDING, SPARSE, HEAVY, SPARSE, HEAVY],
    "compress_rates": {SPARSE: 4, HEAVY: 8},
    "sliding_window": 12,
    "index_n_heads": 12,
    "index_head_dim": 16,
    "index_topk": 3,
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe", "moe"],
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "swiglu_limit": 0.5,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 4,
    "max_position_embeddings": 512,
    "compress_rope_theta": 100.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 8,
        "beta_slow": 1,
    },
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Windows and compressed entries are far shorter than test texts; with 12 index heads, ties between entries are rare
(transformers breaks them in no stated order)."""
_CONSTANT = ("sinks", "position_bias", "base", "e_score_correction_bias")


def make(folder: Path, seed: int = 3, **changes: Any) -> Any:
    """Save a random ``DeepseekV4ForCausalLM`` in small shards and return it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.DeepseekV4Config(**SETTINGS | changes)
    config.dtype = "float32"
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                values.copy_(torch.randint(0, config.n_routed_experts, values.shape))
            elif name.endswith(_CONSTANT):  # made as zeros: a mix-up would not show
                values.add_(torch.randn_like(values) * 0.5)
            elif name.endswith("norm.weight"):
                values.add_(torch.randn_like(values) * 0.1)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def copied(folder: Path, out: Path, rename: Callable[[str], str | None]) -> Path:
    """The same checkpoint in one shard, with other names of tensors; None leaves one out."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {new: array for name, array in load_file(shard).items() if (new := rename(name)) is not None}
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    shutil.copy(folder / "config.json", out)
    return out
