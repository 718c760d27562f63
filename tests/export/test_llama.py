"""Exported Llama checkpoints against transformers, on tiny random ones."""

from __future__ import annotations

import json

import artifacts
import numpy as np
import pytest
import tiny_llama
from safetensors.numpy import load_file, save_file

from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export import compare
from dspark_export.check import prompt_logits
from dspark_export.compare import compare_with_transformers
from dspark_export.errors import ExportError
from dspark_export.verifier import VerifierExport, export_verifier

TOLERANCE = 1e-4

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn as it is stated": {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2}},
    "yarn with weights": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}},
    "theta": {"rope_theta": 500_000.0},
    "wide heads": {"head_dim": 32},
    "one layer": {"num_hidden_layers": 1},
    "large epsilon": {"rms_norm_eps": 0.1},
}


def exported_logits(model, out, token_ids, **options) -> np.ndarray:
    stage = OnnxRuntimeVerifier(artifacts.export(model, out, **options), 1)
    return prompt_logits(stage, token_ids, len(token_ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    model = tiny_llama.make(tmp_path / "model", **VARIANTS[name])
    token_ids = tiny_llama.tokens()
    found = exported_logits(tmp_path / "model", tmp_path / "out", token_ids)
    np.testing.assert_allclose(found, tiny_llama.logits(model, token_ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["attention bias", "mlp bias", "llama3 rope", "linear rope", "large epsilon", "theta"])
def test_what_varies_matters(name, tmp_path):
    """The negative control: ignoring a setting would be seen at this tolerance."""
    model = tiny_llama.make(tmp_path / "model", **VARIANTS[name])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in ("attention_bias", "mlp_bias", "rope_scaling", "rope_parameters", "rms_norm_eps", "rope_theta"):
        config.pop(key, None)
    config["rms_norm_eps"] = 1e-6
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith(".bias")}
    save_file(kept, tmp_path / "model" / "model.safetensors")
    token_ids = tiny_llama.tokens()
    found = exported_logits(tmp_path / "model", tmp_path / "out", token_ids)
    assert np.abs(found - tiny_llama.logits(model, token_ids)).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["float32", "same"])
def test_half_precision_checkpoints(dtype, storage, tmp_path):
    model = tiny_llama.make(tmp_path / "model", dtype=dtype)
    token_ids = tiny_llama.tokens()
    options = {"dtype": dtype if storage == "same" else "float32"}
    found = exported_logits(tmp_path / "model", tmp_path / "out", token_ids, **options)
    np.testing.assert_allclose(found, tiny_llama.logits(model, token_ids), rtol=0, atol=TOLERANCE)


def test_storage_in_half_precision_is_smaller_and_close(tmp_path):
    model = tiny_llama.make(tmp_path / "model")
    token_ids = tiny_llama.tokens()
    expected = tiny_llama.logits(model, token_ids)
    sizes = {}
    for dtype, tolerance in (("float32", TOLERANCE), ("float16", 2e-2), ("bfloat16", 2e-1)):
        found = exported_logits(tmp_path / "model", tmp_path / dtype, token_ids, dtype=dtype)
        assert np.abs(found - expected).max() < tolerance
        sizes[dtype] = (tmp_path / dtype / "model.onnx.data").stat().st_size
    assert sizes["float16"] == sizes["bfloat16"] < 0.75 * sizes["float32"]


def test_shards(tmp_path):
    tiny_llama.make(tmp_path / "whole")
    tiny_llama.make(tmp_path / "sharded", shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    token_ids = tiny_llama.tokens()
    found = exported_logits(tmp_path / "sharded", tmp_path / "out", token_ids)
    assert found.tobytes() == exported_logits(tmp_path / "whole", tmp_path / "other", token_ids).tobytes()


def test_a_missing_shard(tmp_path):
    tiny_llama.make(tmp_path / "model", shard_size="60KB")
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ExportError, match=rf"index.json names {lost.name}, which is missing; download it again"):
        artifacts.export(tmp_path / "model", tmp_path / "out")


def test_eos_of_a_model_without_tokenizer(tmp_path):
    tiny_llama.make(tmp_path / "model")
    stage = OnnxRuntimeVerifier(artifacts.export(tmp_path / "model", tmp_path / "out"), 1)
    assert stage.artifact.eos_token_ids == (5,)


class TestComparison:
    def test_agrees(self, tmp_path):
        tiny_llama.make(tmp_path / "model")
        result = compare_with_transformers(tmp_path / "model", artifacts.export(tmp_path / "model", tmp_path / "out"))
        assert result.tokens == 64 and result.largest_difference < TOLERANCE and result.same_argmax == 1.0

    def test_finds_another_model(self, tmp_path):
        tiny_llama.make(tmp_path / "model")
        tiny_llama.make(tmp_path / "other", rms_norm_eps=0.1)
        artifact = artifacts.export(tmp_path / "other", tmp_path / "out")
        with pytest.raises(ExportError, match="the exported graph differs from transformers"):
            compare_with_transformers(tmp_path / "model", artifact)

    def test_an_export_that_differs_is_not_published(self, tmp_path, monkeypatch):
        tiny_llama.make(tmp_path / "model")
        options = VerifierExport(str(tmp_path / "model"), tmp_path / "out", against_transformers=True)
        assert export_verifier(options, artifacts.silent).comparison.same_argmax == 1.0
        before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        monkeypatch.setattr(compare, "LARGEST_DIFFERENCE", 0.0)
        with pytest.raises(ExportError, match="the exported graph differs from transformers"):
            export_verifier(options, artifacts.silent)
        assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
