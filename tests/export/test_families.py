"""Verifiers of every family against transformers, on tiny random checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import artifacts
import numpy as np
import pytest
import tiny_llama
import tiny_models
from engines import Driver, ids
from schedules import plain_logits, scheduled_logits

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.check import prompt_logits
from dspark_export.errors import ExportError
from dspark_export.families import describe

TOLERANCE = 1e-4
TEXT = tiny_llama.tokens(70)
"""Longer than six windows."""
FAMILIES = tuple(name for name in tiny_models.RECIPES if name != "gemma4_unified")
GEMMAS = tuple(name for name in FAMILIES if name.startswith("gemma"))


class Subject:
    """A random model, its export, and its logits by transformers."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.model = tiny_models.make(name, folder / "model")
        self.folder = folder / "model"
        self.artifact = artifacts.export(self.folder, folder / "artifact")
        self.stage = OnnxRuntimeVerifier(self.artifact, 1)
        self.logits = tiny_llama.logits(self.model, TEXT)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[str, Subject]:
    return {name: Subject(name, tmp_path_factory.mktemp("family")) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_features(subjects, name):
    import torch

    subject = subjects[name]
    subject.stage.allocate(1, 128, ())
    output = subject.stage.step(StepBatch.pack([Segment(0, 0, TEXT, 0)]))
    np.testing.assert_allclose(output.logits, subject.logits, rtol=0, atol=TOLERANCE)
    with torch.inference_mode():
        states = subject.model(torch.tensor([TEXT]), output_hidden_states=True).hidden_states
    taps = subject.stage.artifact.target_layer_ids
    expected = np.concatenate([states[layer + 1][0].numpy() for layer in taps], axis=1)
    np.testing.assert_allclose(output.features, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_greedy_text_through_the_engine(subjects, name, chunk):
    import torch

    subject = subjects[name]
    prompt = TEXT[:30]
    expected = subject.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 30), max_new_tokens=24, do_sample=False
    )
    (sink,) = Driver(subject.artifact, prefill_chunk=chunk).run(ids(*prompt, max_tokens=24))
    assert sink.tokens() == expected[0, 30:].tolist()


@pytest.mark.parametrize("name", GEMMAS)
def test_bits_do_not_depend_on_chunks_and_company(subjects, name):
    stage = subjects[name].stage
    sequences = [TEXT, TEXT[5:40], TEXT[50:53], TEXT[20:61]]
    expected = [plain_logits(stage, sequence) for sequence in sequences]
    for seed in range(8):
        found = scheduled_logits(stage, sequences, np.random.default_rng(seed), 20)
        for left, right in zip(found, expected, strict=True):
            assert left.tobytes() == right.tobytes(), seed


_WIDE = {"vocab_size": 300, "hidden_size": 256, "initializer_range": 0.05, "num_hidden_layers": 2}
_SHAPES = {
    "qwen3": {"head_dim": 128, "num_attention_heads": 8},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "layer_types": tiny_models.LAYER_TYPES[1:3]},
}


@pytest.mark.parametrize("name", _SHAPES)
def test_bits_do_not_depend_on_threads(tmp_path, name):
    """More of them than key heads, heads as wide as released ones, and a context of more than one block of a sum."""
    tiny_models.make(name, tmp_path / "model", **_WIDE | _SHAPES[name])
    artifact = artifacts.export(tmp_path / "model", tmp_path / "out", check=False)
    texts = [tiny_llama.tokens(280), tiny_llama.tokens(40)]
    expected = [plain_logits(OnnxRuntimeVerifier(artifact, 1), text) for text in texts]
    for threads in (2, 4, 8):
        found = scheduled_logits(OnnxRuntimeVerifier(artifact, threads), texts, np.random.default_rng(0), 40)
        for left, right in zip(found, expected, strict=True):
            assert left.tobytes() == right.tobytes(), threads


def test_layers_have_caches_of_their_own_shape(subjects):
    artifact = load_verifier_artifact(subjects["gemma4"].artifact)
    assert artifact.cache_shapes == ((2, 8), (2, 8), (1, 16), (2, 8), (1, 16))
    assert artifact.group == 2
    assert artifact.cache_bytes_per_token == 2 * 4 * (3 * 2 * 8 + 2 * 1 * 16)
    assert load_verifier_artifact(subjects["qwen3"].artifact).cache_shapes == ((2, 16),) * 3


_DROPPED = {
    "gemma3": [
        {"sliding_window": 12},
        {"query_pre_attn_scalar": 25},
        {"final_logit_softcapping": None},
        {"layer_types": ["full_attention"] * 5},
        {"rope_parameters": None, "rope_theta": 10_000.0, "rope_local_base_freq": 100.0},
        {"rms_norm_eps": 1e-3},
    ],
    "gemma4": [
        {"sliding_window": 12},
        {"final_logit_softcapping": None},
        {"rope_parameters": None},
        {"dtype": "bfloat16"},
    ],
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, many in _DROPPED.items() for changes in many],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_config_says_matters(subjects, tmp_path, name, changes):
    """The negative control: another value of a key would be seen at this tolerance."""
    subject = subjects[name]
    folder = copied(subject.folder, tmp_path / "model", changes)
    stage = OnnxRuntimeVerifier(artifacts.export(folder, tmp_path / "out"), 1)
    assert np.abs(prompt_logits(stage, TEXT, len(TEXT)) - subject.logits).max() > 3 * TOLERANCE


def test_old_spelling_of_gemma3(subjects, tmp_path):
    """rope_theta, rope_local_base_freq, rope_scaling and sliding_window_pattern, as released checkpoints have them."""
    import torch
    import transformers

    subject = subjects["gemma3"]
    old = {
        "rope_parameters": None, "rope_theta": 10_000.0, "rope_local_base_freq": 100.0, "layer_types": None,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window_pattern": 3,
        "_sliding_window_pattern": None,
    }  # fmt: skip
    folder = copied(subject.folder, tmp_path / "model", old)
    model = transformers.Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stage = OnnxRuntimeVerifier(artifacts.export(folder, tmp_path / "out"), 1)
    found = prompt_logits(stage, TEXT, len(TEXT))
    np.testing.assert_allclose(found, tiny_llama.logits(model, TEXT), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_multimodal_folders(subjects, tmp_path, name, prefix):
    """Nested config and tensor names in several shards, with tensors of a vision tower beside them."""
    from safetensors.numpy import load_file, save_file

    subject = subjects[name]
    config = json.loads((subject.folder / "config.json").read_text())
    tensors = {
        prefix + key.removeprefix("model."): value
        for key, value in load_file(subject.folder / "model.safetensors").items()
    }
    tensors["model.vision_tower.weight"] = np.ones((3, 3), np.float32)
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {f"model-0000{index + 1}-of-00003.safetensors": sorted(tensors)[index::3] for index in range(3)}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    outer = {"model_type": name, "dtype": "float32", "text_config": config | {"dtype": None}}
    del outer["text_config"]["dtype"]
    (folder / "config.json").write_text(json.dumps(outer))
    stage = OnnxRuntimeVerifier(artifacts.export(folder, tmp_path / "out"), 1)
    np.testing.assert_allclose(prompt_logits(stage, TEXT, len(TEXT)), subject.logits, rtol=0, atol=TOLERANCE)


def test_gemma4_unified(tmp_path):
    model = tiny_models.make("gemma4_unified", tmp_path / "model")
    stage = OnnxRuntimeVerifier(artifacts.export(tmp_path / "model", tmp_path / "out"), 1)
    found = prompt_logits(stage, TEXT, len(TEXT))
    np.testing.assert_allclose(found, tiny_llama.logits(model, TEXT), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_a_bfloat16_checkpoint_has_its_embedding_scale_in_bfloat16(tmp_path, name):
    import torch
    import transformers

    made = tiny_models.make(name, tmp_path / "model", dtype="bfloat16")
    decoder = describe(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert decoder.embedding_scale == float(torch.tensor(48.0**0.5, dtype=torch.bfloat16)) != 48**0.5
    model = type(made).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert isinstance(model, transformers.PreTrainedModel)
    model.model.embed_tokens.embed_scale.fill_(decoder.embedding_scale)
    stage = OnnxRuntimeVerifier(artifacts.export(tmp_path / "model", tmp_path / "out"), 1)
    found = prompt_logits(stage, TEXT, len(TEXT))
    np.testing.assert_allclose(found, tiny_llama.logits(model, TEXT), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", GEMMAS)
def test_int8(subjects, tmp_path, name):
    """Close to float32 (sharp attention makes a random Gemma 4 sensitive), and the same bits whatever the batch."""
    subject = subjects[name]
    stage = OnnxRuntimeVerifier(artifacts.export(subject.folder, tmp_path / "out", dtype="int8", check_tokens=300), 1)
    expected = plain_logits(stage, TEXT)
    assert np.abs(expected - subject.logits).mean() < 0.15 * np.abs(subject.logits).mean()
    (found,) = scheduled_logits(stage, [TEXT], np.random.default_rng(3), 20)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected null, got 50.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected false, got true"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation: expected 'gelu_pytorch_tanh', got 'silu'"),
        ("gemma3", {"layer_types": ["linear_attention"] * 5}, "layer_types: expected sliding_attention or ful"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types: expected 5 layers, got 1"),
        ("gemma3", {"sliding_window": 0}, "sliding_window: expected at least 1, got 0"),
        ("gemma3", {"sliding_window": "wide"}, "config.json: "),
        ("gemma3", {"sliding_window": None}, "sliding_window: expected a number of tokens, got null"),
        ("gemma4", {"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input: expected 0, got 16"),
        ("gemma4", {"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input: expected 0, got 256"),
        ("gemma4", {"num_kv_shared_layers": 2}, "num_kv_shared_layers: expected 0, got 2"),
        ("gemma4", {"enable_moe_block": True}, "enable_moe_block: expected false, got true"),
        ("gemma4", {"use_double_wide_mlp": True}, "use_double_wide_mlp: expected false, got true"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention: expected null, got 'all'"),
        ("gemma4", {"num_key_value_heads": 3}, "to be a multiple of num_key_value_heads"),
        ("gemma4", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type: expected default"),
        ("gemma4", {"model_type": "gemma5"}, "model_type: expected one of .*gemma3, .*, got 'gemma5'"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 8 else "",
)
def test_values_we_cannot_build(subjects, name, changes, message):
    config = json.loads((subjects[name].folder / "config.json").read_text()) | changes
    with pytest.raises(ExportError, match=message):
        describe({key: value for key, value in config.items() if value is not ...})


def test_what_released_configs_leave_out():
    """gemma-3-4b-it says of its language model only what differs from the defaults of transformers."""
    transformers = pytest.importorskip("transformers")
    stated = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    full = json.loads(transformers.Gemma3TextConfig(**stated).to_json_string())
    found = describe({"model_type": "gemma3", "dtype": "bfloat16", "text_config": stated})
    assert found == describe(full | {"dtype": "bfloat16"})
    assert found.cache_shapes == ((4, 256),) * 34 and found.embedding_scale == 50.5
    assert [attention.window for attention in found.attentions[:7]] == [1024] * 5 + [None, 1024]
    assert found.attentions[5].rope.scaling.factor == 8.0 and found.attentions[5].rope.theta == 1_000_000.0
    assert found.attentions[0].rope.theta == 10_000.0 and found.attentions[0].rope.scaling.factor == 1.0


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma4_unified_text"])
def test_what_a_gemma4_config_leaves_out(kind):
    transformers = pytest.importorskip("transformers")
    classes = {"gemma4_text": "Gemma4TextConfig", "gemma4_unified_text": "Gemma4UnifiedTextConfig"}
    stated = {"hidden_size": 3840, "num_hidden_layers": 12, "attention_k_eq_v": True}
    stated |= {"hidden_size_per_layer_input": 0} if kind == "gemma4_text" else {}
    full = json.loads(getattr(transformers, classes[kind])(**stated).to_json_string())
    found = describe({"model_type": kind.removesuffix("_text"), "text_config": stated})
    assert found == describe(full)
    assert found.cache_shapes == (((4, 256),) * 5 + ((4, 512),)) * 2


def test_images_do_not_change_how_text_attends(subjects):
    config = json.loads((subjects["gemma4"].folder / "config.json").read_text())
    assert describe(config | {"use_bidirectional_attention": "vision"}) == describe(config)


def test_a_text_config_of_another_family_is_not_taken(subjects):
    text = json.loads((subjects["gemma4"].folder / "config.json").read_text())
    with pytest.raises(ExportError, match=r"model_type: expected one of .*, got 'paligemma'"):
        describe({"model_type": "paligemma", "text_config": text})


def copied(source: Path, folder: Path, changes: dict) -> Path:
    """A checkpoint with another config."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder
