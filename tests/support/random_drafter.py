"""An untrained drafter for any exported verifier, in the released layout: random weights, so that it is nearly always
wrong, which must cost nothing but time.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dspark_backend.stages.artifact import VerifierArtifact, load_verifier_artifact

RANK = 8


def write_random_drafter(
    verifier: Path, out: Path, *, block: int = 4, layers: int = 1, head: str = "vanilla", seed: int = 0
) -> Path:
    """A checkpoint folder for the verifier in ``verifier``."""
    target = load_verifier_artifact(verifier)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(_config(target, block, layers, head)))
    random = np.random.default_rng(seed)
    tensors = {
        name: (np.ones(shape) if len(shape) == 1 and "bias" not in name else 0.05 * random.standard_normal(shape))
        for name, shape in _shapes(target, layers, head).items()
    }
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, out / "model.safetensors")
    return out


def _config(target: VerifierArtifact, block: int, layers: int, head: str) -> dict[str, object]:
    return {
        "architectures": ["Qwen3DSparkModel" if target.family == "qwen3" else "LlamaDSparkModel"],
        "model_type": target.family,
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": 2 * target.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": target.max_context,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "block_size": block,
        "target_layer_ids": list(target.target_layer_ids),
        "mask_token_id": target.vocab_size - 1,
        "markov_rank": RANK,
        "markov_head_type": head,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }


def _shapes(target: VerifierArtifact, layers: int, head: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = target.hidden_size, 2 * target.hidden_size, target.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, hidden * len(target.target_layer_ids)),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "markov_head.markov_w1.weight": (target.vocab_size, RANK),
        "markov_head.markov_w2.weight": (target.vocab_size, RANK),
        "confidence_head.proj.weight": (1, hidden + RANK),
        "confidence_head.proj.bias": (1,),
    }
    if head == "gated":
        shapes |= {"markov_head.gate_proj.weight": (RANK, hidden + RANK), "markov_head.gate_proj.bias": (RANK,)}
    if head == "rnn":
        width = 3 * RANK
        shapes |= {"markov_head.joint_proj.weight": (width, hidden + 2 * RANK), "markov_head.joint_proj.bias": (width,)}
    for layer in range(layers):
        prefix = f"layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (target.num_heads * dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": (target.num_kv_heads * dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": (target.num_kv_heads * dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, target.num_heads * dim),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
        if target.family == "qwen3":
            shapes |= {f"{prefix}.self_attn.q_norm.weight": (dim,), f"{prefix}.self_attn.k_norm.weight": (dim,)}
    return shapes
