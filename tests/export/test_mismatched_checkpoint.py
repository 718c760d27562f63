"""Configs and weights that do not belong together: refused before anything is written, for either runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import artifacts
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_export.errors import ExportError
from dspark_export.families import describe

RUNTIMES = [{}, {"runtime": "tensorrt", "dtype": "bfloat16"}]


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(artifacts.GOLDEN / "qwen3_rnn" / "target", tmp_path / "model"))


def configure(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def store(model: Path, **tensors) -> None:
    """More tensors; "__" stands for a dot."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(model / "model.safetensors") | more, model / "model.safetensors")


def refused(model: Path, message: str, **options) -> None:
    out = model.parent / "out"
    with pytest.raises(ExportError, match=message):
        artifacts.export(model, out, **options)
    assert not out.exists()


@pytest.mark.parametrize("options", RUNTIMES, ids=["onnxruntime", "tensorrt"])
class TestTensors:
    @pytest.mark.parametrize(
        ("key", "value", "tensor"),
        [
            ("num_key_value_heads", 4, r"k_proj.weight: expected shape \(96, 48\) as config.json says, got \(24, 48\)"),
            ("num_attention_heads", 2, r"q_proj.weight: expected shape \(48, 48\) as config.json says, got \(96, 48\)"),
            (
                "vocab_size",
                299,
                r"embed_tokens.weight: expected shape \(299, 48\) as config.json says, got \(300, 48\)",
            ),
            ("num_hidden_layers", 6, "expected the tensor model.layers.5.input_layernorm.weight"),
            ("attention_bias", True, "expected the tensor model.layers.0.self_attn.q_proj.bias"),
        ],
        ids=lambda value: value if isinstance(value, str) and "_" in value and " " not in value else "",
    )
    def test_other_sizes(self, model, options, key, value, tensor):
        configure(model, **{key: value})
        refused(model, tensor, **options)

    def test_fewer_layers(self, model, options):
        configure(model, num_hidden_layers=4, layer_types=["full_attention"] * 4)
        message = "expected the tensors of 4 qwen3 layers .*, got model.layers.4.input_layernorm.weight and 10 more"
        refused(model, message, **options)

    def test_norms_that_the_family_does_not_have(self, model, options):
        configure(model, model_type="llama")
        refused(model, "5 llama layers .*, got model.layers.0.self_attn.k_norm.weight and 9 more as well", **options)

    def test_a_bias_that_the_config_denies(self, model, options):
        store(model, model__layers__1__mlp__down_proj__bias=np.ones(48, dtype=np.float32))
        refused(model, "got model.layers.1.mlp.down_proj.bias as well, which that model does not have", **options)


def test_a_buffer_of_old_checkpoints(model, tmp_path):
    store(model, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(12, dtype=np.float32))
    artifacts.export(model, tmp_path / "out")


@pytest.mark.parametrize("value", [None, "7", -1])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    ],
)  # fmt: skip
def test_sizes_that_are_none(model, key, value):
    configure(model, **{key: value})
    refused(model, "config.json: |as config.json says")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["sliding_attention"] * 5, "sliding_window": 4},
            "layer_types: expected full_attention in every",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
            "expected the key 'factor' for rope_type 'lin",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None},
            "the key 'low_freq_factor'",
        ),
    ],
    ids=["windows", "linear", "llama3"],
)
def test_keys_that_would_change_the_result(model, changes, message):
    configure(model, **changes)
    refused(model, message)


def test_a_head_that_is_not_the_embedding(model, tmp_path):
    """transformers takes such a head and ignores the key, its older versions the reverse."""
    configure(model, tie_word_embeddings=True)
    refused(model, "expected lm_head.weight to be a copy of model.embed_tokens.weight, as tie_word_embeddings says")
    store(model, lm_head__weight=load_file(model / "model.safetensors")["model.embed_tokens.weight"])
    artifacts.export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "expected some for sliding_attention and full",
        ),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping: expected a number above 0, got 0.0"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping: expected a number above 0, got 'x'"),
        ({"head_dim": 7}, "head_dim: expected an even number, .* got 7"),
        ({"per_layer_config": [1]}, "config.json: 'list' object has no attribute"),
    ],
    ids=["rope of all layers", "no cap", "no number", "odd head", "list"],
)
def test_gemma(changes, message):
    config = {"hidden_size": 64, "num_hidden_layers": 6, "hidden_size_per_layer_input": 0}
    for kind in ("gemma4_text",) if "per_layer_config" in changes else ("gemma3_text", "gemma4_text"):
        with pytest.raises(ExportError, match=message):
            describe(config | {"model_type": kind} | changes)
