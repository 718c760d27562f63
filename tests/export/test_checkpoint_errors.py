"""Sharded and quantised checkpoints: what is whole exports, what is not is named, with exit code 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import artifacts
import pytest
from sharding import split

from dspark_export import cli


@pytest.fixture
def model(tmp_path) -> Path:
    """A golden target in three shards."""
    folder = Path(shutil.copytree(artifacts.GOLDEN / "qwen3_rnn" / "target", tmp_path / "model"))
    split(folder, 3)
    return folder


@pytest.fixture
def refused(tmp_path, capfd, monkeypatch):
    """Runs the command as a user does; returns the one error line."""

    def run(model: Path, *options: str) -> str:
        out = tmp_path / "out"
        arguments = ["dspark-export", "verifier", "--model", str(model), "--out", str(out), *options]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        assert not out.exists() or not list(out.iterdir()), "something was left behind"
        errors = capfd.readouterr().err
        assert "Traceback" not in errors
        return errors[errors.index("error") :]

    return run


def test_shards_give_what_one_file_gives(model, golden_artifacts, tmp_path):
    whole = golden_artifacts["qwen3_rnn"]
    artifacts.export(model, tmp_path / "out", target_layer_ids=artifacts.golden_taps("qwen3_rnn"))
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_missing_shard(model, refused, shard):
    (model / f"model-0000{shard}-of-00003.safetensors").unlink()
    message = refused(model)
    assert f"index.json names model-0000{shard}-of-00003.safetensors, which is missing; download it again" in message


@pytest.mark.parametrize("cut", ["empty", "length", "header", "data", "last byte"])
def test_a_truncated_shard(model, refused, cut):
    file = model / "model-00002-of-00003.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    keep = {"empty": 0, "length": 5, "header": header - 10, "data": header + 100, "last byte": len(content) - 1}[cut]
    file.write_bytes(content[:keep])
    message = refused(model)
    assert "model-00002-of-00003.safetensors: not a complete safetensors file" in message
    assert "download it again" in message


def test_an_index_that_names_tensors_of_no_shard(model, refused):
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = "model-00001-of-00003.safetensors"
    index["weight_map"] |= {"model.layers.9.mlp.up_proj.weight": shard, "model.layers.9.mlp.w.weight": shard}
    file.write_text(json.dumps(index))
    message = refused(model)
    assert f"names model.layers.9.mlp.up_proj.weight and 1 more in {shard}, which no shard holds" in message


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"bits": 4}, "a method config.json does not name"),
    ],
)
def test_a_quantised_checkpoint_is_named_as_such(model, refused, settings, method):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    message = refused(model)
    assert f"got a checkpoint quantised with {method}; export the original checkpoint" in message


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral", "qwen3_moe"])
def test_an_architecture_that_is_not_supported(model, refused, kind):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    message = refused(model)
    assert f"got '{kind}'; this architecture is not supported" in message


def test_an_unknown_precision(model, refused):
    assert "--dtype: expected one of float32" in refused(model, "--dtype", "int3")
