"""GGUF headers and tensors that are not what we build: refused by name, or read as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.target_tensors import check_tensors
from dspark_export.weights.gguf_file import GgufFile

_HEADER: dict[str, Any] = {
    "context_length": 64,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 16,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
_MATRIX = np.zeros((4, 8), dtype=np.float32)
_SHAPES = {
    "token_embd": (10, 8),
    "output_norm": (8,),
    "blk.0.attn_norm": (8,),
    "blk.0.ffn_norm": (8,),
    "blk.0.attn_q": (8, 8),
    "blk.0.attn_k": (4, 8),
    "blk.0.attn_v": (4, 8),
    "blk.0.attn_output": (8, 8),
    "blk.0.ffn_gate": (16, 8),
    "blk.0.ffn_up": (16, 8),
    "blk.0.ffn_down": (8, 16),
}


def write(
    path: Path,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    parts: int = 0,
    architecture: str = "llama",
) -> GgufFile:
    """A model of one layer with more header fields and tensors."""
    writer = gguf.GGUFWriter(str(path / "model.gguf"), architecture)
    for key, value in (_HEADER | (fields or {})).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    if parts:
        writer.add_uint16("split.count", parts)
    whole = {f"{name}.weight": np.zeros(shape, dtype=np.float32) for name, shape in _SHAPES.items()}
    for name, array in (whole | (tensors or {})).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path / "model.gguf")


def test_the_plain_model_is_taken(tmp_path):
    source = write(tmp_path, tensors={"blk.0.attn_rot_embd.weight": _MATRIX, "rope_freqs.weight": np.ones(2, "f4")})
    check_tensors(describe(source.config), source, "model")


def test_a_part_of_a_model(tmp_path):
    with pytest.raises(ExportError, match=r"expected a whole model, got one of 3 parts; .* --merge"):
        write(tmp_path, parts=3)
    write(tmp_path, parts=1)


def test_experts(tmp_path):
    with pytest.raises(ExportError, match=r"expected a dense model, got llama\.expert_count 8"):
        write(tmp_path, {"expert_count": 8})


@pytest.mark.parametrize("key", ["attention.head_count", "feed_forward_length", "embedding_length"])
def test_numbers_that_differ_by_layer(key, tmp_path):
    with pytest.raises(ExportError, match=rf"llama.{key}: expected one number above 0 for all layers, got \[2, 4\]"):
        write(tmp_path, {key: [2, 4]})


def test_names_of_another_architecture(tmp_path):
    with pytest.raises(ExportError, match=r"expected general\.architecture llama or qwen3, got 'mamba'"):
        write(tmp_path, architecture="mamba", tensors={"blk.0.ssm_a": _MATRIX, "blk.0.ffn_gate.0.weight": _MATRIX})


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("blk.0.attn_q.scale", "model.layers.0.self_attn.q_proj.scale"),
        ("blk.0.attn_sub_norm.weight", "model.layers.0.attn_sub_norm.weight"),
        ("blk.0.attn_q.weight.lora_a", "model.layers.0.attn_q.weight.lora_a"),
        ("blk.1.attn_norm.weight", "model.layers.1.input_layernorm.weight"),
        ("output_norm.bias", "model.norm.bias"),
    ],
)
def test_tensors_that_the_graph_would_leave_out(name, shown, tmp_path):
    source = write(tmp_path, tensors={name: _MATRIX})
    with pytest.raises(ExportError, match=f"got {shown} as well, which that model does not have"):
        check_tensors(describe(source.config), source, "model")


@pytest.mark.parametrize(("kind", "name"), [(np.int32, "I32"), (np.float64, "F64")])
def test_types_that_the_package_cannot_dequantise(kind, name, tmp_path):
    source = write(tmp_path, tensors={"blk.0.attn_v.weight": _MATRIX.astype(kind)})
    with pytest.raises(ExportError, match=f"blk.0.attn_v.weight is of type {name}, which the gguf package cannot"):
        source.read("model.layers.0.self_attn.v_proj.weight")


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_kind_is_linear(key, tmp_path):
    scaling = describe(write(tmp_path, {key: 2.0}).config).attention.rope.scaling
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)
