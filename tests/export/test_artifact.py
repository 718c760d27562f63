"""Loading artifacts: a broken one is refused with a message that names it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import artifacts
import pytest

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import STAGE_FILE, load_verifier_artifact
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier


@pytest.fixture
def artifact(golden_artifacts, tmp_path) -> Path:
    return Path(shutil.copytree(golden_artifacts["qwen3_rnn"], tmp_path / "artifact"))


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        OnnxRuntimeVerifier(directory, 1)
    assert str(directory) in str(caught.value)


def change(directory: Path, **changes) -> None:
    stage = json.loads((directory / STAGE_FILE).read_text()) | changes
    (directory / STAGE_FILE).write_text(json.dumps({key: value for key, value in stage.items() if value is not ...}))


def test_what_an_export_says(golden_artifacts):
    artifact = load_verifier_artifact(golden_artifacts["qwen3_rnn"])
    assert (artifact.family, artifact.dtype, artifact.vocab_size, artifact.num_layers) == ("qwen3", "float32", 300, 5)
    assert artifact.target_layer_ids == artifacts.golden_taps("qwen3_rnn")
    assert artifact.group == artifact.num_heads // artifact.num_kv_heads
    assert artifact.cache_bytes_per_token == 2 * 5 * artifact.num_kv_heads * artifact.head_dim * 4
    assert re.fullmatch(r"[0-9a-f]{64}", artifact.source_hash)
    assert "onnxruntime" in artifact.tool_versions


def test_no_stage_json(artifact):
    (artifact / STAGE_FILE).unlink()
    refused(artifact, r"expected an exported verifier \(stage.json\), found none; export the model again")


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "expected an exported verifier")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null"])
def test_not_json(artifact, content):
    (artifact / STAGE_FILE).write_bytes(content)
    refused(artifact, "stage.json: expected")


@pytest.mark.parametrize("kind", ["drafter", 5, ...])
def test_wrong_kind(artifact, kind):
    change(artifact, kind=kind)
    refused(artifact, "expected the kind 'verifier', got")


@pytest.mark.parametrize("version", [0, 99, "1", ...])
def test_wrong_format_version(artifact, version):
    change(artifact, format_version=version)
    refused(artifact, "expected format_version .*, got .*; export the model again")


@pytest.mark.parametrize("key", ["vocab_size", "files", "target_layer_ids"])
def test_missing_key(artifact, key):
    change(artifact, **{key: ...})
    refused(artifact, f"expected the keys {key}, which are missing")


def test_several_missing_keys(artifact):
    change(artifact, vocab_size=..., files=...)
    refused(artifact, "expected the keys files, vocab_size, which are missing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "300"),
        ("num_layers", None),
        ("head_dim", True),
        ("target_layer_ids", 3),
        ("files", ["model.onnx"]),
        ("family", 5),
    ],
)
def test_values_of_the_wrong_type(artifact, key, value):
    change(artifact, **{key: value})
    refused(artifact, f"{key}: expected .*, got {re.escape(repr(value))}")


def test_incomplete_tensor_location(artifact):
    change(artifact, embedding={"file": "model.onnx.data"})
    refused(artifact, "a tensor's location is incomplete")


def test_without_layer_caches_all_layers_are_alike(artifact):
    """As artifacts of before there were others say it."""
    expected = load_verifier_artifact(artifact)
    change(artifact, layer_caches=...)
    found = load_verifier_artifact(artifact)
    assert found.cache_shapes == expected.cache_shapes == ((found.num_kv_heads, found.head_dim),) * found.num_layers


@pytest.mark.parametrize("caches", [[[1, 16]], [[1, 16, 2]] * 5, [[0, 16]] * 5, [["one", 16]] * 5, [[]] * 5, [16] * 5])
def test_damaged_layer_caches(artifact, caches):
    change(artifact, layer_caches=caches)
    refused(artifact, "export the model again")


def test_other_runtime(artifact):
    change(artifact, runtime="tensorrt")
    refused(artifact, "expected an artifact for onnxruntime, got one for tensorrt")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
class TestFiles:
    def test_missing(self, artifact, name):
        (artifact / name).unlink()
        refused(artifact, f"stage.json names {re.escape(name)}, which is missing")

    @pytest.mark.parametrize("by", [-1, 1])
    def test_wrong_size(self, artifact, name, by):
        content = (artifact / name).read_bytes()
        (artifact / name).write_bytes(content[:by] if by < 0 else content + b"x")
        refused(artifact, f"expected {len(content)} bytes as stage.json says, found {len(content) + by}; .*corrupt")


def test_garbage_that_stage_json_vouches_for(artifact):
    stage = json.loads((artifact / STAGE_FILE).read_text())
    garbage = b"\x93" * stage["files"]["model.onnx"]
    (artifact / "model.onnx").write_bytes(garbage)
    stage["digests"]["model.onnx"] = hashlib.sha256(garbage).hexdigest()
    (artifact / STAGE_FILE).write_text(json.dumps(stage))
    refused(artifact, "model.onnx: ONNX Runtime cannot load the graph")


def test_garbage_of_the_right_size(artifact):
    size = (artifact / "model.onnx").stat().st_size
    (artifact / "model.onnx").write_bytes(b"\x93" * size)
    refused(artifact, "model.onnx: expected the contents that stage.json names by their SHA-256")
