"""GGUF files written from a tiny Llama must export to the bits of its Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import artifacts
import gguf
import numpy as np
import pytest
import tiny_llama
from tokenizers import pre_tokenizers

from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.check import prompt_logits
from dspark_export.errors import ExportError
from dspark_export.weights.gguf_file import GgufFile

VOCAB = 260
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp orders them: channel i and i + d/2 of a head become neighbours."""
    dim = rows.shape[0] // heads
    order = [head * dim + i + half * (dim // 2) for head in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return np.ascontiguousarray(rows[order])


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def write(path: Path, model: Any, fields: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None):
    """A GGUF file of a model, with a byte-level tokenizer; ``fields`` add or (None) remove header fields."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    header = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
    } | (fields or {})
    for key, value in header.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        elif value is not None:
            writer.add_uint32(f"llama.{key}", value)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<1>", "<2>", "<3>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".q_proj." in name:
            array = interleaved(array, config.num_attention_heads)
        if ".k_proj." in name:
            array = interleaved(array, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), array)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def exported_logits(model: Path, out: Path) -> np.ndarray:
    stage = OnnxRuntimeVerifier(artifacts.export(model, out), 1)
    token_ids = tiny_llama.tokens(vocab=VOCAB)
    return prompt_logits(stage, token_ids, len(token_ids))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["grouped", "multi-head", "tied", "biases"],
)
def test_the_same_bits_as_the_folder(changes, tmp_path):
    model = tiny_llama.make(tmp_path / "folder", vocab_size=VOCAB, **changes)
    write(tmp_path / "model.gguf", model)
    found = exported_logits(tmp_path / "model.gguf", tmp_path / "out")
    assert found.tobytes() == exported_logits(tmp_path / "folder", tmp_path / "other").tobytes()


@pytest.mark.parametrize("attention", [None, 0.5])
def test_yarn(tmp_path, attention):
    """llama.cpp multiplies what the file states with what follows from the factor."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    fields = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0}
    if attention:
        scaling["attention_factor"] = attention * (0.1 * np.log(4.0) + 1.0)
        fields["attn_factor"] = attention
    model = tiny_llama.make(tmp_path / "folder", vocab_size=VOCAB, rope_scaling=scaling)
    write(tmp_path / "model.gguf", model, {f"rope.scaling.{key}": value for key, value in fields.items()})
    found = exported_logits(tmp_path / "model.gguf", tmp_path / "out")
    assert found.tobytes() == exported_logits(tmp_path / "folder", tmp_path / "other").tobytes()


def test_rope_frequencies(tmp_path):
    """llama.cpp writes the stretching of Llama 3 as a divisor for each channel pair."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = tiny_llama.make(tmp_path / "folder", vocab_size=VOCAB, rope_scaling=scaling)
    dim = model.config.hidden_size // model.config.num_attention_heads
    plain = 10_000.0 ** -(np.arange(0, dim, 2) / dim)
    divisors = plain / model.model.rotary_emb.inv_freq.numpy()
    assert divisors.max() > 7.9
    write(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": divisors.astype(np.float32)})
    expected = tiny_llama.logits(model, tiny_llama.tokens(vocab=VOCAB))
    np.testing.assert_allclose(exported_logits(tmp_path / "model.gguf", tmp_path / "out"), expected, rtol=0, atol=1e-4)
    write(tmp_path / "without.gguf", model)
    without = exported_logits(tmp_path / "without.gguf", tmp_path / "other")
    assert np.abs(without - expected).max() > 1e-3


def test_linear_scaling(tmp_path):
    model = tiny_llama.make(tmp_path / "folder", vocab_size=VOCAB, rope_scaling={"rope_type": "linear", "factor": 4.0})
    write(tmp_path / "model.gguf", model, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    found = exported_logits(tmp_path / "model.gguf", tmp_path / "out")
    assert found.tobytes() == exported_logits(tmp_path / "folder", tmp_path / "other").tobytes()


def test_header(tmp_path):
    model = tiny_llama.make(tmp_path / "folder", vocab_size=VOCAB)
    source = GgufFile(write(tmp_path / "model.gguf", model))
    assert source.config["vocab_size"] == VOCAB
    assert source.config["num_key_value_heads"] == 2
    assert source.shape("model.layers.0.mlp.down_proj.weight") == (48, 80)
    assert source.names() == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert (source.read(name) == tensor.numpy()).all(), name


class TestErrors:
    @pytest.fixture
    def model(self, tmp_path):
        return tiny_llama.make(tmp_path / "folder", vocab_size=VOCAB)

    @pytest.mark.parametrize("keep", [0, 3, 100, 50_000])
    def test_truncated(self, model, tmp_path, keep):
        whole = write(tmp_path / "model.gguf", model).read_bytes()
        (tmp_path / "cut.gguf").write_bytes(whole[:keep])
        with pytest.raises(ExportError, match="not a complete GGUF file"):
            artifacts.export(tmp_path / "cut.gguf", tmp_path / "out")

    @pytest.mark.parametrize("field", ["context_length", "embedding_length", "attention.head_count"])
    def test_missing_field(self, model, tmp_path, field):
        write(tmp_path / "model.gguf", model, {field: None})
        with pytest.raises(ExportError, match=f"expected the header field llama.{field}, found none"):
            artifacts.export(tmp_path / "model.gguf", tmp_path / "out")

    def test_partial_rotation(self, model, tmp_path):
        write(tmp_path / "model.gguf", model, {"rope.dimension_count": 6})
        with pytest.raises(ExportError, match="partial_rotary_factor: expected"):
            artifacts.export(tmp_path / "model.gguf", tmp_path / "out")

    def test_unknown_scaling(self, model, tmp_path):
        write(tmp_path / "model.gguf", model, {"rope.scaling.type": "longrope"})
        with pytest.raises(ExportError, match="rope_type: expected default, linear, llama3 or yarn, got 'longrope'"):
            artifacts.export(tmp_path / "model.gguf", tmp_path / "out")

    def test_missing_tensor(self, model, tmp_path):
        state = dict(model.state_dict())
        model.state_dict = lambda: {name: t for name, t in state.items() if name != "model.embed_tokens.weight"}
        write(tmp_path / "model.gguf", model)
        with pytest.raises(ExportError, match=r"expected a tensor for model.embed_tokens.weight, found none"):
            artifacts.export(tmp_path / "model.gguf", tmp_path / "out")

    def test_other_architecture(self, tmp_path):
        writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ExportError, match=r"expected general\.architecture llama or qwen3, got 'mamba'"):
            artifacts.export(tmp_path / "model.gguf", tmp_path / "out")
