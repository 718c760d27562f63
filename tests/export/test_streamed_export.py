"""A sharded bfloat16 checkpoint goes through little memory, and its bits come out as they went in."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_export.verifier import VerifierExport, export_verifier
from dspark_export.weights.safetensors_folder import SafetensorsFolder

_CHILD = """
import sys
from pathlib import Path
from dspark_export.verifier import VerifierExport, export_verifier
def peak():
    # ru_maxrss would begin with the peak of the process that started this one.
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
def export(model, out):
    # The check loads the whole graph.
    export_verifier(VerifierExport(model, Path(out), dtype="bfloat16", check=False), lambda *_: None)
export(*sys.argv[1:3])  # a tiny one loads every library and code path
before = peak()
export(*sys.argv[3:5])
print(before, peak())
"""


def write_checkpoint(folder: Path, hidden: int, inner: int, layers: int, vocab: int) -> int:
    """A random Llama in bfloat16, a shard for a quarter of its layers; returns the bytes of the largest shard."""
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)

    def tensor(*shape: int) -> np.ndarray:
        # Any finite pattern of bits will do: exponents stay below those of infinities.
        return (random.integers(0, 0x3F00, shape, dtype=np.uint16)).view(ml_dtypes.bfloat16)

    shards: list[dict[str, np.ndarray]] = [{} for _ in range(4)]
    shards[0] |= {"model.embed_tokens.weight": tensor(vocab, hidden), "model.norm.weight": tensor(hidden)}
    for layer in range(layers):
        prefix, shard = f"model.layers.{layer}", shards[layer * 4 // layers]
        for name in ("q", "k", "v", "o"):
            shard[f"{prefix}.self_attn.{name}_proj.weight"] = tensor(hidden, hidden)
        for name in ("gate", "up"):
            shard[f"{prefix}.mlp.{name}_proj.weight"] = tensor(inner, hidden)
        shard[f"{prefix}.mlp.down_proj.weight"] = tensor(hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}.{name}.weight"] = tensor(hidden)
    weight_map, sizes = {}, []
    for index, tensors in enumerate(shards):
        name = f"model-{index + 1:05}-of-00004.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        sizes.append((folder / name).stat().st_size)
        tensors.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(sizes)


@pytest.mark.slow
def test_little_more_memory_than_the_largest_shard(tmp_path):
    write_checkpoint(tmp_path / "tiny", 64, 64, 4, 128)
    largest = write_checkpoint(tmp_path / "large", 1024, 4096, 12, 8192)
    total = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert total > 390e6 and largest < 0.3 * total
    paths = [str(tmp_path / name) for name in ("tiny", "out_tiny", "large", "out")]
    result = subprocess.run([sys.executable, "-c", _CHILD, *paths], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    before, after = (int(kib) * 1024 for kib in result.stdout.split())
    growth = after - before
    said = f"{total / 2**20:.0f} MiB, largest shard {largest / 2**20:.0f} MiB: peak grew by {growth / 2**20:.0f} MiB"
    logging.getLogger(__name__).info(said)
    assert 0 < growth < 1.25 * largest, said


def test_bfloat16_bits_are_kept(tmp_path):
    write_checkpoint(tmp_path / "model", 64, 128, 4, 128)
    export_verifier(VerifierExport(str(tmp_path / "model"), tmp_path / "out", dtype="bfloat16"), lambda *_: None)
    artifact = load_verifier_artifact(tmp_path / "out")
    weights = SafetensorsFolder(tmp_path / "model")
    location = artifact.embedding
    stored = np.memmap(tmp_path / "out" / location.file, np.uint16, "r", location.offset, location.shape)
    np.testing.assert_array_equal(stored, weights.read("model.embed_tokens.weight").view(np.uint16))
    data = (tmp_path / "out" / "model.onnx.data").read_bytes()
    for name in sorted(weights.names()):
        if not name.endswith("norm.weight"):
            bits = weights.read(name).view(np.uint16)
            # Products may be stored as [in, out], and side by side with others: by rows or columns.
            assert bits.tobytes() in data or all(row.tobytes() in data for row in bits.T.copy()), name
