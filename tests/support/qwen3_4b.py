"""Qwen3-4B and its released drafter in their true shapes, with fewer layers, and weights that take no disk."""

from __future__ import annotations

import zlib

import numpy as np

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560,
    "intermediate_size": 9728, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True, "max_position_embeddings": 40960,
    "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
DRAFTER = CONFIG | {
    "architectures": ["Qwen3DSparkModel"], "tie_word_embeddings": False, "block_size": 7, "markov_rank": 256,
    "target_layer_ids": [1, 9, 17, 25, 33], "mask_token_id": 151669, "markov_head_type": "vanilla",
    "enable_confidence_head": True, "confidence_head_with_markov": True,
}  # fmt: skip


class Repeated:
    """Implements ``WeightSource``: random numbers, the same ones over and over within a tensor."""

    def __init__(self, config, shapes):
        self.config, self.files, self._shapes = config, (), shapes

    def names(self):
        return frozenset(self._shapes)

    def shape(self, name):
        return self._shapes[name]

    def read(self, name):
        # Equal weights would be stored once.
        random = np.random.default_rng(zlib.crc32(name.encode()))
        return np.resize(random.standard_normal(99991, dtype=np.float32).astype(np.float16), self._shapes[name])


def target(layers):
    """Without its embedding, which is an input of the engines."""
    shapes = {"model.norm.weight": (2560,)} | _layers("model.layers", layers)
    return Repeated(CONFIG | {"num_hidden_layers": layers}, shapes)


def drafter(layers):
    shapes = {
        "fc.weight": (2560, 5 * 2560), "hidden_norm.weight": (2560,), "norm.weight": (2560,),
        "markov_head.markov_w1.weight": (151936, 256), "markov_head.markov_w2.weight": (151936, 256),
        "confidence_head.proj.weight": (1, 2560 + 256), "confidence_head.proj.bias": (1,),
    }  # fmt: skip
    return Repeated(DRAFTER | {"num_hidden_layers": layers}, shapes | _layers("layers", layers))


def _layers(prefix, layers):
    return {
        f"{prefix}.{layer}.{name}.weight": shape
        for layer in range(layers)
        for name, shape in {
            "self_attn.q_proj": (4096, 2560), "self_attn.k_proj": (1024, 2560), "self_attn.v_proj": (1024, 2560),
            "self_attn.o_proj": (2560, 4096), "self_attn.q_norm": (128,), "self_attn.k_norm": (128,),
            "mlp.gate_proj": (9728, 2560), "mlp.up_proj": (9728, 2560), "mlp.down_proj": (2560, 9728),
            "input_layernorm": (2560,), "post_attention_layernorm": (2560,),
        }.items()
    }  # fmt: skip
