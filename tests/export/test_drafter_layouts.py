"""Drafters in the layouts of other libraries: the same numbers, and refusals that name what is recognised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import GOLDEN, golden_arrays, silent
from drafters import (
    bind_intermediates,
    changed_checkpoint,
    context_rows,
    draft_batch,
    export_golden_drafter,
    golden_rounds,
    reduced_checkpoint,
)
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

from dspark_backend.stages.artifact import STAGE_FILE
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.errors import ExportError
from dspark_export.layouts import describe_checkpoint
from dspark_export.layouts.speculators import LAYER_DEFAULTS
from dspark_export.torch_drafter import TorchDrafter

NAME = "qwen3_vanilla"
SLIDING, FULL = "sliding_attention", "full_attention"
KEPT = np.sort(np.random.default_rng(3).permutation(384)[:120])
_HEADS = ("block_size", "mask_token_id", "markov_rank", "markov_head_type", "confidence_head_with_markov")


def speculators_config(**changes) -> dict:
    """The golden drafter's config.json as ``speculators`` writes it: a layer config that leaves defaults out."""
    flat = json.loads((GOLDEN / NAME / "drafter" / "config.json").read_text())
    layer = {key: flat[key] for key in LAYER_DEFAULTS["qwen3"] if flat[key] != LAYER_DEFAULTS["qwen3"][key]}
    layer |= {"model_type": "qwen3", "rope_parameters": flat["rope_parameters"]}
    config = {key: flat[key] for key in _HEADS} | {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "speculators_config": {"algorithm": "dspark", "verifier": {"architectures": ["Qwen3ForCausalLM"]}},
        "aux_hidden_state_layer_ids": [index + 1 for index in flat["target_layer_ids"]],
        "draft_vocab_size": flat["vocab_size"],
        "enable_confidence_head": True,
        "sample_from_anchor": True,
        "transformer_layer_config": layer,
    }
    return config | changes


def speculators_checkpoint(out: Path, kept: np.ndarray | None = None, tensors: dict | None = None, **changes) -> Path:
    """The golden drafter in that layout; with ``kept``, of a reduced vocabulary."""
    stored = load_file(GOLDEN / NAME / "drafter" / "model.safetensors")
    stored["verifier_norm.weight"] = np.ones(64, np.float32)
    if kept is not None:
        for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
            stored[name] = np.ascontiguousarray(stored[name][kept])
        stored["d2t"] = (kept - np.arange(len(kept))).astype(np.int64)
        stored["t2d"] = np.isin(np.arange(384), kept)
        changes.setdefault("draft_vocab_size", len(kept))
    stored |= tensors or {}
    out.mkdir(parents=True)
    save_file({key: value for key, value in stored.items() if value is not None}, out / "model.safetensors")
    config = {key: value for key, value in speculators_config(**changes).items() if value is not ...}
    (out / "config.json").write_text(json.dumps(config))
    return out


def rounds_of(artifacts_root: Path, verifier: Path, checkpoint: Path) -> list[dict[str, np.ndarray]]:
    """Everything that an exported drafter says in the golden rounds."""
    export_golden_drafter("", verifier, artifacts_root, checkpoint)
    stage = OnnxRuntimeDrafter(artifacts_root, verifier, threads=1)
    stage.allocate(1, 128, ())
    inner = bind_intermediates(stage, 1)
    features = golden_arrays(NAME)["target_features"]
    said = []
    for round_ in golden_rounds(NAME):
        context = context_rows(features, round_.first, round_.start, slot=0)
        output = stage.draft(draft_batch(stage.artifact, context, [round_.anchor], [0], [round_.start]))
        said.append(
            {key: value.copy() for key, value in inner.items()}
            | {"draft_tokens": output.tokens.copy(), "confidence_logits": output.confidence_logits.copy()}
        )
    return said


def test_speculators_without_d2t_says_what_the_reference_says(golden_artifacts, tmp_path):
    said = rounds_of(tmp_path / "a", golden_artifacts[NAME], speculators_checkpoint(tmp_path / "c"))
    for round_, got in zip(golden_rounds(NAME), said, strict=True):
        assert got["draft_tokens"][0].tolist() == round_.draft_tokens.tolist()
        for key in ("hidden", "base_logits", "draft_logits", "confidence_logits"):
            np.testing.assert_allclose(got[key][0], getattr(round_, key), rtol=0, atol=1e-4, err_msg=key)


def test_speculators_with_d2t_equals_the_released_layout(golden_artifacts, tmp_path):
    verifier = golden_artifacts[NAME]
    said = rounds_of(tmp_path / "a", verifier, speculators_checkpoint(tmp_path / "c", KEPT))
    expected = rounds_of(tmp_path / "b", verifier, reduced_checkpoint(NAME, tmp_path / "r", KEPT))
    for round_, got, wanted in zip(golden_rounds(NAME), said, expected, strict=True):
        for key, values in wanted.items():
            np.testing.assert_array_equal(got[key], values, err_msg=key)
        np.testing.assert_allclose(got["hidden"][0], round_.hidden, rtol=0, atol=1e-4)
        np.testing.assert_allclose(got["base_logits"][0], round_.base_logits[:, KEPT], rtol=0, atol=1e-4)
        best = KEPT[np.argmax(round_.draft_logits[0, KEPT])]
        assert got["draft_tokens"][0, 0] == best and set(got["draft_tokens"][0].tolist()) <= set(KEPT.tolist())


def layers_of(kinds: list[str], window: object = 6, **keys) -> dict:
    """Changes to a config: these layers, of which sliding ones have this window."""
    layer = speculators_config()["transformer_layer_config"] | {
        "layer_types": kinds, "sliding_window": window, "use_sliding_window": True,
    }  # fmt: skip
    return {"transformer_layer_config": layer | keys}


@pytest.mark.parametrize(
    ("kinds", "both_ways"), [([SLIDING, FULL], False), ([FULL, SLIDING], True), ([SLIDING, SLIDING], False)]
)
def test_sliding_layers(golden_artifacts, tmp_path, kinds, both_ways):
    """Windows end before the anchor; in layers that have one, the block is causal unless the config says otherwise."""
    changes = layers_of(kinds) | {"sliding_window_non_causal": both_ways}
    checkpoint = speculators_checkpoint(tmp_path / "c", **changes)
    said = rounds_of(tmp_path / "a", golden_artifacts[NAME], checkpoint)
    spec = describe_checkpoint(json.loads((checkpoint / "config.json").read_text()))
    assert [attention.window for attention in spec.decoder.layer_attentions] == [
        6 if kind == SLIDING else None for kind in kinds
    ]
    stored = load_file(GOLDEN / NAME / "drafter" / "model.safetensors")
    tensors = {name: torch.from_numpy(array) for name, array in stored.items()}
    module = TorchDrafter(spec, tensors.pop("embed_tokens.weight"), tensors.pop("lm_head.weight")).eval()
    module.load_state_dict(tensors)
    features = torch.from_numpy(golden_arrays(NAME)["target_features"])
    tokens = torch.from_numpy(np.concatenate([golden_arrays(NAME)[key] for key in ("prompt", "greedy")]))
    with torch.no_grad():
        many = module.forward_blocks(features, torch.tensor([3, 40]), tokens).hidden
        for row, anchor in enumerate((3, 40)):
            one = module(features[:anchor], torch.arange(anchor), int(tokens[anchor]), anchor).hidden[0]
            torch.testing.assert_close(many[row], one, rtol=0, atol=1e-5)
    for round_, got in zip(golden_rounds(NAME), said, strict=True):
        seen = features[: round_.start].clone()
        if FULL not in kinds:
            seen[:-6] = 7.0
        with torch.no_grad():
            expected = module(seen, torch.arange(round_.start), round_.anchor, round_.start)
        for key in ("hidden", "base_logits", "draft_logits", "confidence_logits"):
            np.testing.assert_allclose(got[key], getattr(expected, key), rtol=0, atol=1e-4, err_msg=key)
        # The negative control: without windows it says something else.
        assert np.abs(got["hidden"][0] - round_.hidden).max() > 1e-2


def test_windows_that_a_config_leaves_to_its_class():
    """Qwen3's default of 4096 where a window is used, and its default of layers that have none."""
    changes = layers_of([SLIDING, FULL], max_window_layers=1)
    del changes["transformer_layer_config"]["sliding_window"], changes["transformer_layer_config"]["layer_types"]
    spec = describe_checkpoint(speculators_config(**changes))
    assert [attention.window for attention in spec.decoder.layer_attentions] == [None, 4096] and spec.causal_windows
    changes["transformer_layer_config"]["use_sliding_window"] = False
    plain = describe_checkpoint(speculators_config(**changes))
    assert plain.decoder.layer_attentions[1].window is None and not plain.causal_windows


@pytest.mark.parametrize(("family", "kind"), [("qwen3", Qwen3Config), ("llama", LlamaConfig)])
def test_defaults_of_layer_configs_are_those_of_transformers(family, kind):
    stated = kind().to_dict()
    assert LAYER_DEFAULTS[family] == {key: stated[key] for key in LAYER_DEFAULTS[family]}
    spec = describe_checkpoint(speculators_config(transformer_layer_config={"model_type": family}, mask_token_id=7))
    assert spec.decoder.hidden_size == stated["hidden_size"]
    assert spec.decoder.attention.rope.theta == stated["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("method", ["eagle3", "dflash", "mtp", "dsv4_dspark", None])
def test_other_methods_are_refused_by_name(golden_artifacts, tmp_path, method):
    config = speculators_config(speculators_model_type=method, speculators_config={"algorithm": method})
    with pytest.raises(ExportError, match=f"expected speculators_model_type 'dspark', got {method!r}"):
        describe_checkpoint(config)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle3", "DFlashDraftModel", "Qwen3MTP"])
def test_other_architectures_are_refused_by_name(architecture):
    with pytest.raises(ExportError, match=rf"expected a DSpark drafter, got one for \w+ \({architecture}\)"):
        describe_checkpoint({"architectures": [architecture], "model_type": "llama"})


@pytest.mark.parametrize(
    ("config", "tensors", "kept", "message"),
    [
        ({"aux_hidden_state_layer_ids": [0, 2, 4]}, {}, None, r"hidden states counted from 1 \(layer \+ 1\), got \[0"),
        ({"aux_hidden_state_layer_ids": [0 + 2, 3, 5]}, {}, None, r"target_layer_ids \[1, 2, 4\], the verifier \[0, 2"),
        ({"sample_from_anchor": False}, {}, None, "sample_from_anchor: expected true, got false"),
        ({"sample_from_anchor": ...}, {}, None, "sample_from_anchor: expected true, got none"),
        (layers_of([SLIDING]), {}, None, "layer_types: expected .* for each of 2 layers, got sliding_attention"),
        (layers_of(["chunked", FULL]), {}, None, "layer_types: expected .* for each of 2 layers, got chunked, full"),
        (layers_of([SLIDING, FULL], None), {}, None, "sliding_window: expected a number of positions .*, got None"),
        (layers_of([SLIDING, FULL], use_sliding_window=False), {}, None, "sliding_window: expected a number .* None"),
        ({"markov_rank": 0}, {}, None, "markov_rank: expected at least 1, got 0"),
        ({"target_hidden_size": 128}, {}, None, "target_hidden_size: expected the drafter's own 64, got 128"),
        ({"mask_token_id": ...}, {}, None, "expected the key 'mask_token_id'"),
        ({"transformer_layer_config": ...}, {}, None, "expected the key 'transformer_layer_config'"),
        ({}, {"draft_adapter.0.weight": np.ones((2, 64), np.float32)}, None, r"got draft_adapter\.0\.weight as well"),
        ({}, {"fc.weight": None}, None, r"expected the tensor fc\.weight"),
        ({"draft_vocab_size": 120}, {}, None, "expected the tensor d2t, since draft_vocab_size 120"),
        ({}, {"d2t": KEPT.astype(np.int64)}, KEPT, "d2t: expected offsets to 120 different token ids below 384"),
        ({}, {"t2d": np.arange(384) < 120}, KEPT, "t2d: expected to mark the 120 tokens of d2t"),
        (
            {}, {"embed_tokens.weight": np.random.default_rng(0).normal(size=(384, 64)).astype(np.float32)}, None,
            "expected the target's token embedding in it, got another one",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, None, "quantised with fp8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(golden_artifacts, tmp_path, config, tensors, kept, message):
    checkpoint = speculators_checkpoint(tmp_path / "c", kept, tensors, **config)
    with pytest.raises(ExportError, match=message):
        export_drafter(DrafterExport(checkpoint, golden_artifacts[NAME], tmp_path / "out"), silent)
    assert not (tmp_path / "out" / STAGE_FILE).exists()


def test_a_flat_config_with_the_tables_of_speculators(golden_artifacts, tmp_path):
    tables = {"d2t": (KEPT - np.arange(120)).astype(np.int64), "t2d": np.isin(np.arange(384), KEPT)}
    second = load_file(GOLDEN / NAME / "drafter" / "model.safetensors")["markov_head.markov_w2.weight"]
    tables |= {"markov_head.markov_w2.weight": np.ascontiguousarray(second[KEPT])}
    source = GOLDEN / NAME / "drafter"
    checkpoint = changed_checkpoint(source, tmp_path / "c", {"draft_vocab_size": 120}, tables)
    export_drafter(DrafterExport(checkpoint, golden_artifacts[NAME], tmp_path / "d"), silent)
    assert np.load(tmp_path / "d" / "d2t.npy").tolist() == KEPT.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dspark_bonus_anchor": True, "dspark_markov_rank": 96}, "only the mask slots predict are not supported"),
        ({"sample_from_anchor": False}, "only the mask slots predict are not supported"),
        ({"attention_sink_bias": True}, "attention sinks are not supported"),
    ],
)
def test_other_blocks_in_a_flat_config(changes, message):
    config = json.loads((GOLDEN / NAME / "drafter" / "config.json").read_text())
    with pytest.raises(ExportError, match=message):
        describe_checkpoint(config | changes)


def test_a_released_drafter_of_another_target_with_equal_shapes(golden_artifacts, tmp_path):
    other = np.random.default_rng(1).normal(size=(384, 64)).astype(np.float32)
    checkpoint = changed_checkpoint(GOLDEN / NAME / "drafter", tmp_path / "c", tensors={"embed_tokens.weight": other})
    with pytest.raises(ExportError, match=r"drafter c does not fit verifier target: .*median cosine"):
        export_drafter(DrafterExport(checkpoint, golden_artifacts[NAME], tmp_path / "out"), silent)
