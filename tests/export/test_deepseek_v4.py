"""The DeepSeek-V4 verifier against transformers, on a tiny random checkpoint with layers of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import artifacts
import numpy as np
import pytest
import tiny_deepseek_v4
import tiny_llama
from engines import Driver, ids
from schedules import plain_logits, scheduled_logits
from tiny_deepseek_v4 import HEAVY, SLIDING, SPARSE

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.check import prompt_logits
from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.planner import plan

TOLERANCE = 1e-4
TEXT = tiny_llama.tokens(70)
"""Nearly six windows, 17 and 8 compressed entries."""


class Subject:
    """The model, its export, and its logits by transformers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "model"
        self.model = tiny_deepseek_v4.make(self.folder)
        # The last layer too, as the released drafters read it.
        self.artifact = artifacts.export(self.folder, folder / "artifact", target_layer_ids=(1, 3, 4))
        self.stage = OnnxRuntimeVerifier(self.artifact, 1)
        self.logits = tiny_llama.logits(self.model, TEXT)


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(tmp_path_factory.mktemp("deepseek"))


def greedy(model, prompt: list[int], count: int) -> list[int]:
    import torch

    mask = torch.ones(1, len(prompt))
    out = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_logits_and_features(subject):
    """Features are the mean of the residual streams behind a layer."""
    import torch

    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, index=index: seen.__setitem__(index, output))
        for index, layer in enumerate(subject.model.model.layers)
    ]
    with torch.inference_mode():
        subject.model(torch.tensor([TEXT]))
    for hook in hooks:
        hook.remove()
    expected = np.concatenate([seen[layer][0].mean(dim=1).numpy() for layer in (1, 3, 4)], axis=1)
    subject.stage.allocate(1, 128, ())
    output = subject.stage.step(StepBatch.pack([Segment(0, 0, TEXT, 0)]))
    np.testing.assert_allclose(output.logits, subject.logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(output.features, expected, rtol=0, atol=TOLERANCE)
    assert output.argmax.tolist() == subject.logits.argmax(axis=1).tolist()


def test_bits_do_not_depend_on_chunks_and_company(subject):
    """Nor on rejected drafts, slots and capacities. (Engines never have one below a compressed entry: there, close.)"""
    whole = prompt_logits(subject.stage, TEXT, len(TEXT))
    for chunk in (1, 2, 5, 8, 33):
        assert prompt_logits(subject.stage, TEXT, chunk).tobytes() == whole.tobytes(), chunk
    np.testing.assert_allclose(prompt_logits(subject.stage, TEXT[:3], 3), whole[:3], rtol=0, atol=1e-5)
    sequences = [TEXT, TEXT[5:40], TEXT[50:53], TEXT[20:61]]
    expected = [plain_logits(subject.stage, sequence) for sequence in sequences]
    for seed in range(3):
        found = scheduled_logits(subject.stage, sequences, np.random.default_rng(seed), 20)
        for left, right in zip(found, expected, strict=True):
            assert left.tobytes() == right.tobytes(), seed


@pytest.mark.slow
def test_bits_do_not_depend_on_threads(tmp_path):
    """Large enough for kernels to share products and sums out among threads."""
    larger = {
        "hidden_size": 512, "head_dim": 256, "num_attention_heads": 8, "moe_intermediate_size": 192,
        "q_lora_rank": 128, "index_n_heads": 32, "index_head_dim": 192, "index_topk": 20, "n_routed_experts": 16,
        "compress_rates": {SPARSE: 4, HEAVY: 128}, "initializer_range": 0.03, "swiglu_limit": 10.0,
    }  # fmt: skip
    model = tiny_deepseek_v4.make(tmp_path / "model", **larger)
    artifact = artifacts.export(tmp_path / "model", tmp_path / "out", check=False)
    text = tiny_llama.tokens(160)
    expected = plain_logits(OnnxRuntimeVerifier(artifact, 1), text)
    np.testing.assert_allclose(expected, tiny_llama.logits(model, text), rtol=0, atol=TOLERANCE)
    found = scheduled_logits(OnnxRuntimeVerifier(artifact, 4), [text, text[5:40]], np.random.default_rng(0), 40)
    assert found[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_greedy_text_through_the_engine(subject, chunk):
    prompt = TEXT[:30]
    (sink,) = Driver(subject.artifact, prefill_chunk=chunk).run(ids(*prompt, max_tokens=24))
    assert sink.tokens() == greedy(subject.model, prompt, 24)


def test_of_equal_entries_the_earliest_is_chosen(tmp_path, monkeypatch):
    """With few index heads many scores are exactly 0; the reference is made to break ties as we do."""
    import torch

    def stable(values, k, dim=-1, **_):
        ordered = torch.sort(values, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((ordered.values[..., :k], ordered.indices[..., :k]))

    model = tiny_deepseek_v4.make(tmp_path / "model", index_n_heads=2)
    monkeypatch.setattr(torch.Tensor, "topk", stable)
    stage = OnnxRuntimeVerifier(artifacts.export(tmp_path / "model", tmp_path / "out", check=False), 1)
    found = prompt_logits(stage, TEXT, len(TEXT))
    np.testing.assert_allclose(found, tiny_llama.logits(model, TEXT), rtol=0, atol=TOLERANCE)


def test_names_of_released_checkpoints(subject, tmp_path):
    """``layers.0.attn.wq_a.weight``, ``embed.weight``, ``hc_head_fn``: the same graph."""
    names = {
        "model.embed_tokens.weight": "embed.weight",
        "model.hc_head.hc_fn": "hc_head_fn",
        "model.hc_head.hc_base": "hc_head_base",
        "model.hc_head.hc_scale": "hc_head_scale",
    }
    tiny_deepseek_v4.copied(
        subject.folder, tmp_path / "model", lambda name: names.get(name, name.removeprefix("model."))
    )
    stage = OnnxRuntimeVerifier(artifacts.export(tmp_path / "model", tmp_path / "out", check=False), 1)
    expected = prompt_logits(subject.stage, TEXT, len(TEXT))
    assert prompt_logits(stage, TEXT, len(TEXT)).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"index_topk": 4},
        {"hc_sinkhorn_iters": 1},
        {"swiglu_limit": 10.0},
        {"routed_scaling_factor": 1.0},
        {"layer_types": [SLIDING, SPARSE, SLIDING, SPARSE, HEAVY]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_config_says_matters(subject, tmp_path, changes):
    """The negative control: another value of a key would be seen at this tolerance."""
    folder = shutil.copytree(subject.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    stage = OnnxRuntimeVerifier(artifacts.export(folder, tmp_path / "out", check=False), 1)
    assert np.abs(prompt_logits(stage, TEXT, len(TEXT)) - subject.logits).max() > 3 * TOLERANCE


def test_caches_hold_a_row_a_position(subject):
    """Half a latent, and what the compressors need of the position."""
    artifact = load_verifier_artifact(subject.artifact)
    sparse = (1, 8 + 2 * 16 + 2 * 16)
    assert artifact.cache_shapes == ((1, 8), sparse, (1, 8 + 16), sparse, (1, 8 + 16))


RELEASED = {
    "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 4096, "moe_intermediate_size": 2048,
    "num_hidden_layers": 43, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512,
    "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_lora_rank": 1024, "o_groups": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512,
    "sliding_window": 128, "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0, 0, 0], "num_hash_layers": 3,
    "compress_rope_theta": 160000, "rope_theta": 10000, "max_position_embeddings": 1048576, "hc_mult": 4,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1,
    },
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "swiglu_limit": 10.0, "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def test_released_configs_read_as_transformers_reads_them():
    transformers = pytest.importorskip("transformers")
    found = describe(RELEASED | {"dspark_target_layer_ids": [40, 41, 42]})
    assert found.default_taps() == (40, 41, 42) and found.last_tap == 42
    full = transformers.DeepseekV4Config(**{k: v for k, v in RELEASED.items() if k != "model_type"}).to_dict()
    assert describe(full) == describe(RELEASED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func: expected 'sqrtsoftplus', got 'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"n_shared_experts": 2}, "n_shared_experts: expected 1, got 2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: expected 1, got 2"),
        ({"mlp_bias": True}, "mlp_bias: expected false, got true"),
        ({"compress_ratios": [0] * 42 + [64]}, "compress_ratios: expected 0, 4 or 128, got 64"),
        ({"layer_types": ["full_attention"] * 43}, "layer_types: expected sliding_attention, compressed_sparse"),
        ({"layer_types": [SLIDING]}, "layer_types: expected 43 layers, got 1"),
        ({"mlp_layer_types": ["dense"] * 43}, "mlp_layer_types: expected hash_moe or moe, got dense"),
        ({"o_groups": 7}, "o_groups: expected a divisor of 64 heads x 512, got 7"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type: expected default or yarn, got 'linear'"),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 1.2}}, "attention_factor: expected 1.0, got 1.2"),
        ({"head_dim": None}, "config.json: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_we_cannot_build(changes, message):
    with pytest.raises(ExportError, match=message):
        describe(RELEASED | changes)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"runtime": "tensorrt", "dtype": "float16"}])
def test_other_graphs_are_refused(subject, tmp_path, options):
    with pytest.raises(ExportError, match="deepseek_v4: expected --runtime onnxruntime and --dtype float32, float16"):
        artifacts.export(subject.folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_plans_are_refused():
    with pytest.raises(ExportError, match="model_type deepseek_v4: its sizes are not planned"):
        plan(describe(RELEASED), None, "bfloat16", 4096, None)


def test_a_missing_tensor_is_named(subject, tmp_path):
    gone = "model.layers.2.ffn.experts.3.w2.weight"
    tiny_deepseek_v4.copied(subject.folder, tmp_path / "model", lambda name: None if name == gone else name)
    with pytest.raises(ExportError, match=r"expected the tensor layers\.2\.ffn\.experts\.3\.w2\.weight"):
        artifacts.export(tmp_path / "model", tmp_path / "out")
