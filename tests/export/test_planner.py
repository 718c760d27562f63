"""Plans from config.json alone, against published parameter counts."""

from __future__ import annotations

import json

import onnx
import pytest
from artifacts import GOLDEN, export, golden_taps, silent
from safetensors.numpy import load_file
from typer.testing import CliRunner

from dspark_backend.stages.engine_contract import Workload
from dspark_export import cli
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.gpus import GIB, find_gpu
from dspark_export.layouts import describe_checkpoint
from dspark_export.parameters import count_drafter, count_target
from dspark_export.planner import PRECISIONS, cache_bytes_per_token, drafter_size, plan, profiles, weight_bytes
from dspark_export.tensorrt_graphs import SHARED_FILE

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_4B = QWEN3 | {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_8B = QWEN3 | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_14B = QWEN3 | {
    "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
DSPARK = {
    "architectures": ["Qwen3DSparkModel"],
    "num_hidden_layers": 5,
    "block_size": 7,
    "target_layer_ids": [1, 9, 17, 25, 33],
    "mask_token_id": 151669,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "tie_word_embeddings": False,
}
CONTEXT = 8192


@pytest.mark.parametrize(
    ("config", "published", "cache"),
    [
        (QWEN3_4B, 4_022_468_096, 2 * 36 * 8 * 128 * 2),
        (QWEN3_8B, 8_190_735_360, 2 * 36 * 8 * 128 * 2),
        (QWEN3_14B, 14_768_307_200, 2 * 40 * 8 * 128 * 2),
        (LLAMA31_8B, 8_030_261_248, 2 * 32 * 8 * 128 * 2),
        # 4,300,079,472 with the vision tower and its projection.
        (GEMMA3_4B, 3_880_099_328, 2 * 34 * 4 * 256 * 2),
    ],
    ids=["qwen3-4b", "qwen3-8b", "qwen3-14b", "llama-3.1-8b", "gemma-3-4b"],
)
def test_parameters_and_cache_of_released_models(config, published, cache):
    decoder = describe(config)
    assert count_target(decoder).total == pytest.approx(published, rel=0.01)
    assert cache_bytes_per_token(decoder, "bfloat16") == cache
    assert cache_bytes_per_token(decoder, "float32") == 2 * cache
    assert weight_bytes(count_target(decoder), "bfloat16") == pytest.approx(2 * published, rel=0.01)


@pytest.mark.parametrize("name", ["qwen3_vanilla", "qwen3_gated", "qwen3_rnn"])
def test_counts_are_those_of_the_golden_files(name):
    for part, count in (("target", lambda c: count_target(describe(c))), ("drafter", None)):
        config = json.loads((GOLDEN / name / part / "config.json").read_text())
        stored = load_file(GOLDEN / name / part / "model.safetensors")
        counted = count(config) if count else count_drafter(describe_checkpoint(config))
        assert counted.total == sum(tensor.size for tensor in stored.values())


def test_every_precision_is_smaller_than_the_one_before_it():
    sizes = {p: weight_bytes(count_target(describe(QWEN3_8B)), p) for p in PRECISIONS}
    assert sizes["float32"] > sizes["bfloat16"] == sizes["float16"] > sizes["fp8"] > sizes["int4"]
    # Of a layer, queries, keys, values, gate and up read a norm; the rest, and embedding and head, stay at two bytes.
    normed = 36 * 4096 * ((32 + 2 * 8) * 128 + 2 * 12288)
    assert sizes["fp8"] == pytest.approx(2 * 8_190_735_360 - normed, rel=0.001)
    inner = 8_190_735_360 - 2 * 151936 * 4096
    assert sizes["int4"] == pytest.approx(inner * (0.5 + 2 / 64) + 2 * 2 * 151936 * 4096, rel=0.001)


@pytest.mark.parametrize("dtype", ["fp8", "int4", "bfloat16"])
def test_sizes_are_those_of_written_graphs(dtype, tmp_path):
    name = "qwen3_vanilla"
    target, drafter = (GOLDEN / name / part for part in ("target", "drafter"))
    verifier = tmp_path / "verifier"
    rounding = "nearest" if dtype == "int4" else "gptq"
    export(target, verifier, dtype=dtype, runtime="tensorrt", target_layer_ids=golden_taps(name), rounding=rounding)
    export_drafter(DrafterExport(drafter, verifier, tmp_path / "drafter", dtype, "tensorrt"), silent)
    shared = json.loads((verifier / "stage.json").read_text())["files"][SHARED_FILE]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (target, drafter)]
    planned = weight_bytes(count_target(describe(configs[0])), dtype)
    # Numbers of less than 256 bytes are inside the graph's own file; the norms of fc are in both graphs.
    assert stored_weights(verifier) + shared == pytest.approx(planned, rel=0.006)
    planned = drafter_size(describe_checkpoint(configs[1]), dtype).artifact_bytes
    assert stored_weights(tmp_path / "drafter") == pytest.approx(planned, rel=0.006)


def stored_weights(folder):
    """Bytes of all weights beside the graphs, without the tables of RoPE."""
    sizes = []
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            places = {entry.key: entry.value for entry in tensor.external_data}
            if places.get("location") == f"{path.name}.data" and not tensor.name.startswith("rope_"):
                sizes.append(int(places["length"]))
    return sum(sizes)


def test_qwen3_8b_with_its_drafter_on_a_24_gib_gpu():
    made = plan(describe(QWEN3_8B), describe_checkpoint(QWEN3_8B | DSPARK), "bfloat16", CONTEXT, find_gpu("24GiB"))
    assert made.drafter is not None and made.slots is not None
    assert made.drafter.cache_bytes_per_token == 2 * 5 * 8 * 128 * 2
    # Its own numbers are told for every precision alike, whichever is planned.
    other = plan(describe(QWEN3_8B), describe_checkpoint(QWEN3_8B | DSPARK), "fp8", CONTEXT, None).drafter
    assert other is not None and other.weight_bytes == made.drafter.weight_bytes
    held = made.target.artifact_bytes + made.drafter.artifact_bytes + made.workspace_bytes
    token = made.target.cache_bytes_per_token + made.drafter.cache_bytes_per_token
    positions = Workload(CONTEXT, made.slots, 7).capacity
    used = held + made.slots * token * positions
    assert made.slots > 0 and used <= 0.92 * 24 * GIB < used + token * positions
    models = (made.target, made.drafter)
    assert made.disk_bytes == sum(size.download_bytes + 2 * size.artifact_bytes for size in models)
    assert {profile.engine for profile in made.profiles} == {"verifier", "draft", "context"}
    assert max(profile.high for profile in made.profiles if profile.name.startswith("verify")) == made.slots * 8


def test_a_smaller_precision_and_a_shorter_context_fit_more():
    decoder = describe(QWEN3_8B)

    def slots(precision, context, gpu="L4"):
        return plan(decoder, None, precision, context, find_gpu(gpu)).slots

    assert slots("fp8", CONTEXT) > slots("bfloat16", CONTEXT) < slots("bfloat16", 2048)
    assert slots("bfloat16", CONTEXT, "16GiB") == 0
    assert slots("bfloat16", CONTEXT, "A100-80GB") > 10


def test_profiles_cover_every_step_without_holes():
    for block in (0, 7):
        for count in (0, 1, 16, 300):
            shapes = profiles(block, count, CONTEXT)
            assert all(1 <= shape.low <= shape.best <= shape.high for shape in shapes)
            verifier = [shape for shape in shapes if shape.engine == "verifier"]
            assert verifier[-1].name == "prefill" and verifier[-1].high == 512 + max(1, count) * (1 + block)
            assert verifier[-2].high == max(1, count) * (1 + block)


@pytest.mark.parametrize(
    ("text", "memory"), [("24GiB", 24 * GIB), ("24", 24 * GIB), ("80 GB", 80 * 10**9), ("rtx 4090", 24 * GIB)]
)
def test_gpus_by_size_and_name(text, memory):
    assert find_gpu(text).memory == memory


@pytest.mark.parametrize(
    ("changes", "precision", "context", "gpu", "message"),
    [
        ({"hidden_size": 2560}, "bfloat16", CONTEXT, "", "--drafter: it has hidden_size 2560, the model 4096"),
        ({"target_layer_ids": [1, 35]}, "bfloat16", CONTEXT, "", r"it reads layers \[1, 35\], the model has 0 to 35"),
        ({}, "int3", CONTEXT, "", "--dtype: expected one of float32, .*got 'int3'"),
        ({}, "bfloat16", 40961, "", "--context: expected 2 to the model's 40960, got 40961"),
        ({}, "fp8", CONTEXT, "A100-80GB", r"fp8 needs a GPU from SM89 on, got A100-80GB \(SM80\); .* or int4"),
        ({}, "fp8", CONTEXT, "T4", r"fp8 needs a GPU from SM89 on, got T4 \(SM75\); export with --dtype float16$"),
        ({}, "int4", CONTEXT, "T4", r"int4 needs a GPU from SM80 on, got T4 \(SM75\); .* float16$"),
        ({}, "bfloat16", CONTEXT, "T4", r"bfloat16 needs a GPU from SM80 on, got T4 \(SM75\); .* float16$"),
        ({}, "bfloat16", CONTEXT, "Voodoo2", "--gpu: expected a size such as 24GiB or one of T4, .*got 'Voodoo2'"),
    ],
)
def test_what_cannot_be_planned(changes, precision, context, gpu, message):
    with pytest.raises(ExportError, match=message):
        drafter = describe_checkpoint(QWEN3_8B | DSPARK | changes)
        plan(describe(QWEN3_8B), drafter, precision, context, find_gpu(gpu) if gpu else None)


class TestCommand:
    @pytest.fixture
    def folders(self, tmp_path):
        for name, config in (("model", QWEN3_8B), ("drafter", QWEN3_8B | DSPARK)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        return ["--model", str(tmp_path / "model"), "--drafter", str(tmp_path / "drafter")]

    def test_table(self, folders):
        result = CliRunner().invoke(cli.app, ["plan", *folders, "--gpu", "L4"])
        assert result.exit_code == 0, result.output
        assert "8.191 B" in result.output and "144 KiB" in result.output and "slots of 8192" in result.output

    def test_json(self, folders):
        result = CliRunner().invoke(cli.app, ["plan", *folders, "--gpu", "80GiB", "--dtype", "fp8", "--json"])
        made = json.loads(result.stdout)
        assert made["target"]["parameters"] == 8_190_735_360 and made["slots"] > 1 and made["disk_bytes"] > 1e10

    def test_a_context_of_nothing(self, folders):
        result = CliRunner().invoke(cli.app, ["plan", *folders, "--context", "0"])
        assert isinstance(result.exception, ExportError) and "--context: expected 2 to" in str(result.exception)

    def test_dry_runs(self, folders, golden_artifacts, tmp_path):
        out = ["--out", str(tmp_path / "out")]
        target = CliRunner().invoke(cli.app, ["verifier", *folders[:2], *out, "--dry-run", "--dtype", "int8"])
        assert target.exit_code == 0 and "8.191 B" in target.output, target.output
        taps = CliRunner().invoke(cli.app, ["verifier", *folders[:2], *out, "--dry-run", "--target-layer-ids", "1,99"])
        assert isinstance(taps.exception, ExportError) and "--target-layer-ids: expected layers" in str(taps.exception)
        golden = GOLDEN / "qwen3_rnn" / "drafter"
        arguments = ["--verifier", str(golden_artifacts["qwen3_rnn"]), *out, "--dry-run"]
        draft = CliRunner().invoke(cli.app, ["drafter", "--checkpoint", str(golden), *arguments])
        assert draft.exit_code == 0 and "weights, float32" in draft.output, draft.output
        other = CliRunner().invoke(cli.app, ["drafter", "--checkpoint", folders[3], *arguments])
        assert isinstance(other.exception, ExportError) and "vocab_size 151936" in str(other.exception)
        assert not (tmp_path / "out").exists()

    def test_no_model_there(self, tmp_path, capfd, monkeypatch):
        monkeypatch.setattr("sys.argv", ["dspark-export", "plan", "--model", str(tmp_path)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1 and "with config.json, found none" in capfd.readouterr().err
