"""Exported drafters: the reference's numbers, the torch module's, and the messages for what does not fit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from artifacts import GOLDEN, GOLDEN_NAMES, export, golden_arrays, golden_taps, silent, variant
from drafters import (
    bind_intermediates,
    changed_checkpoint,
    context_rows,
    draft_batch,
    export_golden_drafter,
    golden_rounds,
    llama_pair,
    reduced_checkpoint,
)
from safetensors.numpy import load_file

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import STAGE_FILE, load_drafter_artifact
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.stages.shared_weights import D2T_FILE
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.errors import ExportError
from dspark_export.torch_drafter import load_torch_drafter

TOLERANCE = 1e-4
NAME = "qwen3_gated"


@pytest.fixture(autouse=True)
def one_torch_thread():
    """On a busy machine torch's threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_of(name):
    golden = golden_arrays(name)
    return golden["target_features"], np.concatenate([golden["prompt"], golden["greedy"]])


@pytest.fixture(scope="module")
def drafters(golden_artifacts, tmp_path_factory):
    """Exported golden drafters, with their inner values as outputs."""
    root = tmp_path_factory.mktemp("drafters")
    for name in GOLDEN_NAMES:
        export_golden_drafter(name, golden_artifacts[name], root / name)
    return {name: root / name for name in GOLDEN_NAMES}


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_golden_round(golden_artifacts, drafters, name):
    stage = OnnxRuntimeDrafter(drafters[name], golden_artifacts[name], threads=1)
    features, _ = text_of(name)
    stage.allocate(2, 128, ())
    inner = bind_intermediates(stage, 1)
    count = 0
    for round_ in golden_rounds(name):
        context = context_rows(features, round_.first, round_.start, slot=1)
        output = stage.draft(draft_batch(stage.artifact, context, [round_.anchor], [1], [round_.start]))
        assert output.tokens[0].tolist() == round_.draft_tokens.tolist()
        got = inner | {"confidence_logits": output.confidence_logits}
        for key, values in got.items():
            np.testing.assert_allclose(
                values[0], getattr(round_, key), rtol=0, atol=TOLERANCE, err_msg=f"{key}, round {round_.index}"
            )
        count += 1
    assert count == 9


def test_the_artifact_says_what_was_exported(golden_artifacts, drafters):
    artifact = load_drafter_artifact(drafters[NAME])
    assert artifact.block_size == 5 and artifact.markov_head == "gated" and artifact.has_confidence
    assert artifact.target_layer_ids == golden_taps(NAME)
    assert artifact.vocab_size == artifact.draft_vocab_size == 320 and artifact.num_candidates == 64
    assert len(artifact.source_hash) == 64 and len(artifact.verifier_hash) == 64
    # Embedding and LM head are the verifier's: the two matrices of 320 x 64 floats are not here again.
    stored = sum(file.stat().st_size for file in drafters[NAME].iterdir())
    own = load_file(GOLDEN / NAME / "drafter" / "model.safetensors")
    both = own.pop("embed_tokens.weight").nbytes + own.pop("lm_head.weight").nbytes
    context = sum(
        own[key].nbytes
        for key in own
        if key in ("fc.weight", "hidden_norm.weight") or "k_proj" in key or "v_proj" in key
    )
    rope_and_graph = 2 * 2 * artifact.max_context * artifact.head_dim // 2 * 4 + 150_000
    assert stored < sum(value.nbytes for value in own.values()) + context + rope_and_graph
    assert both > 100_000


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_llama_drafter_equals_its_torch_module(tmp_path, head):
    pair = llama_pair(tmp_path, head)
    artifact = export_golden_drafter("", pair.verifier, tmp_path / "d", pair.checkpoint)
    assert artifact.architecture == "LlamaDSparkModel" and artifact.max_context == 512
    stage = OnnxRuntimeDrafter(tmp_path / "d", pair.verifier, threads=1)
    random = np.random.default_rng(4)
    features = random.normal(size=(200, 96)).astype(np.float32)
    stage.allocate(1, 256, ())
    inner = bind_intermediates(stage, 1)
    first = 0
    # Beyond the 64 positions from which the stretched RoPE differs from the plain one.
    for start in (3, 4, 60, 61, 150, 200):
        anchor = int(random.integers(211))
        context = context_rows(features, first, start, slot=0)
        output = stage.draft(draft_batch(artifact, context, [anchor], [0], [start]))
        with torch.no_grad():
            expected = pair.drafter(torch.from_numpy(features[:start]), torch.arange(start), anchor, start)
        for key, values in (inner | {"confidence_logits": output.confidence_logits}).items():
            np.testing.assert_allclose(values, getattr(expected, key).numpy(), rtol=0, atol=TOLERANCE, err_msg=key)
        assert output.tokens.tolist() == expected.tokens.tolist()
        first = start


def test_a_reduced_vocabulary_proposes_target_tokens_of_its_own(golden_artifacts, tmp_path):
    kept = np.random.default_rng(1).permutation(320)[:90]
    checkpoint = reduced_checkpoint(NAME, tmp_path / "c", kept)
    artifact = export_golden_drafter("", golden_artifacts[NAME], tmp_path / "d", checkpoint)
    assert artifact.draft_vocab_size == 90 and artifact.vocab_size == 320
    assert np.load(tmp_path / "d" / D2T_FILE).tolist() == kept.tolist()
    stage = OnnxRuntimeDrafter(tmp_path / "d", golden_artifacts[NAME], threads=1)
    target = load_file(GOLDEN / NAME / "target" / "model.safetensors")
    reference = load_torch_drafter(
        checkpoint,
        torch.from_numpy(target["model.embed_tokens.weight"]),
        torch.from_numpy(target.get("lm_head.weight", target["model.embed_tokens.weight"])),
    )
    features, _ = text_of(NAME)
    stage.allocate(1, 128, ())
    inner = bind_intermediates(stage, 1)
    for round_ in golden_rounds(NAME):
        context = context_rows(features, round_.first, round_.start, slot=0)
        output = stage.draft(
            draft_batch(artifact, context, [round_.anchor], [0], [round_.start], top_k=64, uniforms=None)
        )
        assert set(output.candidates.flatten().tolist()) <= set(kept.tolist())
        assert all(len(set(row)) == 64 for row in output.candidates[0].tolist())
        # The base logits do not depend on what was drawn; the first slot's draft logits neither.
        np.testing.assert_allclose(inner["base_logits"][0], round_.base_logits[:, kept], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(inner["draft_logits"][0, 0], round_.draft_logits[0, kept], rtol=0, atol=TOLERANCE)
        greedy = stage.draft(draft_batch(artifact, context, [round_.anchor], [0], [round_.start]))
        with torch.no_grad():
            rows = torch.from_numpy(features[: round_.start])
            expected = reference(rows, torch.arange(round_.start), round_.anchor, round_.start)
        assert greedy.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(inner["draft_logits"], expected.draft_logits.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("table", [[0, 1, 2], [0, 1, 320], [0, 1, -1]])
def test_a_damaged_token_table_is_named(golden_artifacts, drafters, tmp_path, table):
    directory = variant(drafters[NAME], tmp_path / "d", draft_vocab_size=3 if len(set(table) - {2}) == 3 else 4)
    np.save(directory / D2T_FILE, np.array(table))
    with pytest.raises(ArtifactError, match="token ids below 320; export the drafter again"):
        OnnxRuntimeDrafter(directory, golden_artifacts[NAME])


def test_without_a_confidence_head_every_draft_is_certain(golden_artifacts, tmp_path):
    source = GOLDEN / NAME / "drafter"
    gone = {"confidence_head.proj.weight": None, "confidence_head.proj.bias": None}
    checkpoint = changed_checkpoint(source, tmp_path / "c", {"enable_confidence_head": False}, gone)
    artifact = export_golden_drafter("", golden_artifacts[NAME], tmp_path / "d", checkpoint)
    assert not artifact.has_confidence
    stage = OnnxRuntimeDrafter(tmp_path / "d", golden_artifacts[NAME], threads=1)
    features, _ = text_of(NAME)
    stage.allocate(1, 64, ())
    round_ = next(golden_rounds(NAME))
    context = context_rows(features, 0, round_.start, slot=0)
    output = stage.draft(draft_batch(artifact, context, [round_.anchor], [0], [round_.start]))
    assert (output.confidence_logits == 30.0).all()
    assert output.tokens[0].tolist() == round_.draft_tokens.tolist()


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"target_layer_ids": [0, 3]}, {}, r"the drafter has target_layer_ids \[0, 3\], the verifier \[1, 3\]; .*0,3"),
        ({"vocab_size": 321}, {}, "the drafter has vocab_size 321, the verifier 320"),
        ({"hidden_size": 32}, {}, "the drafter has hidden_size 32, the verifier 64"),
        (
            {"architectures": ["Gemma9DSparkModel"]},
            {},
            "Qwen3DSparkModel, LlamaDSparkModel, Gemma4DSparkModel, got 'Gemma9DSparkModel'",
        ),
        ({"architectures": None}, {}, "got None"),
        ({"markov_head_type": "lstm"}, {}, "expected vanilla, gated or rnn, got 'lstm'"),
        ({"markov_head_type": "rnn"}, {}, r"markov_head\.joint_proj\.weight"),
        ({"markov_rank": None}, {}, "expected the key 'markov_rank'"),
        ({"block_size": 0}, {}, "block_size: expected 1 to 64, got 0"),
        ({"mask_token_id": 320}, {}, "mask_token_id: expected a token below 320, got 320"),
        ({}, {"fc.weight": None}, r"expected the tensor fc\.weight"),
        ({}, {"layers.0.self_attn.q_norm.weight": None}, r"layers\.0\.self_attn\.q_norm\.weight"),
        ({}, {"norm.weight": np.ones(63, np.float32)}, r"norm\.weight of shape \(64,\), got \(63,\)"),
        ({}, {"layers.1.norm.weight": np.ones(9, np.float32)}, r"of 1 layers and a .*, got layers\.1\.norm\.weight as"),
        ({}, {"layers.0.mlp.up_proj.bias": np.ones(9, np.float32)}, r"got layers\.0\.mlp\.up_proj\.bias as well"),
        (
            {},
            {"markov_head.joint_proj.bias": np.ones(9, np.float32)},
            r"a gated head, .*markov_head\.joint_proj\.bias as",
        ),
        ({"mask_token_id": 1.5}, {}, r"mask_token_id: expected a whole number, got 1\.5"),
        ({"block_size": "7"}, {}, "block_size: expected a whole number, got '7'"),
        ({"markov_rank": [1]}, {}, r"markov_rank: expected a whole number, got \[1\]"),
        ({"target_layer_ids": 1}, {}, "target_layer_ids: expected a list of layers, got 1"),
        ({"draft_vocab_size": 100}, {}, r"markov_w2\.weight of shape \(100, 64\), got \(320, 64\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(golden_artifacts, tmp_path, config, tensors, message):
    checkpoint = changed_checkpoint(GOLDEN / NAME / "drafter", tmp_path / "c", config, tensors)
    out = tmp_path / "out"
    with pytest.raises(ExportError, match=message):
        export_drafter(DrafterExport(checkpoint, golden_artifacts[NAME], out), silent)
    assert not (out / STAGE_FILE).exists()


@pytest.mark.parametrize("kept", [[0, 1, 320], [0, 1, 1], [-1, 1, 2]])
def test_a_wrong_token_table_is_refused_for_engines(tmp_path, kept):
    verifier = export(
        GOLDEN / NAME / "target",
        tmp_path / "v",
        target_layer_ids=golden_taps(NAME),
        runtime="tensorrt",
        dtype="bfloat16",
    )
    rows = load_file(GOLDEN / NAME / "drafter" / "model.safetensors")["markov_head.markov_w2.weight"][:3]
    tensors = {"markov_head.markov_w2.weight": rows, "d2t": np.array(kept)}
    checkpoint = changed_checkpoint(GOLDEN / NAME / "drafter", tmp_path / "c", {"draft_vocab_size": 3}, tensors)
    with pytest.raises(ExportError, match="d2t: expected 3 different token ids below 320, got"):
        export_drafter(DrafterExport(checkpoint, verifier, tmp_path / "d", "bfloat16", "tensorrt"), silent)


def test_wrong_taps_name_both_sides_and_the_option(golden_artifacts, tmp_path):
    verifier = export(GOLDEN / NAME / "target", tmp_path / "v", target_layer_ids=(0, 3))
    with pytest.raises(ExportError) as caught:
        export_drafter(DrafterExport(GOLDEN / NAME / "drafter", verifier, tmp_path / "d"), silent)
    message = str(caught.value)
    assert "drafter drafter" in message and "verifier target" in message
    assert "[1, 3]" in message and "[0, 3]" in message and "--target-layer-ids 1,3" in message


def test_missing_inputs_and_wrong_types_are_named(golden_artifacts, tmp_path):
    with pytest.raises(ExportError, match="--dtype"):
        DrafterExport(GOLDEN / NAME / "drafter", golden_artifacts[NAME], tmp_path / "d", dtype="int3")
    with pytest.raises(ExportError, match=r"config\.json"):
        export_drafter(DrafterExport(tmp_path, golden_artifacts[NAME], tmp_path / "d"), silent)
    with pytest.raises(ArtifactError, match="exported verifier"):
        export_drafter(DrafterExport(GOLDEN / NAME / "drafter", tmp_path, tmp_path / "d"), silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_hash": "0" * 64}, "source hash .* has 000000000000; export the drafter again"),
        ({"target_layer_ids": [0, 3]}, r"target_layer_ids \[1, 3\], the verifier \[0, 3\]; .*--target-layer-ids 1,3"),
        ({"vocab_size": 319}, "vocab_size 320, the verifier 319"),
        ({"max_context": 513}, "expected one for sequences of 513 tokens, .*, got 512; export the drafter again"),
    ],
)
def test_a_drafter_of_another_verifier_does_not_load(golden_artifacts, drafters, tmp_path, changes, message):
    verifier = variant(golden_artifacts[NAME], tmp_path / "v", **changes)
    with pytest.raises(ArtifactError, match=message):
        OnnxRuntimeDrafter(drafters[NAME], verifier)


def test_a_verifier_is_no_drafter(golden_artifacts):
    with pytest.raises(ArtifactError, match="expected the kind 'drafter', got 'verifier'"):
        OnnxRuntimeDrafter(golden_artifacts[NAME], golden_artifacts[NAME])


def test_a_damaged_checkpoint_leaves_the_old_artifact(golden_artifacts, tmp_path):
    out = tmp_path / "d"
    export_drafter(DrafterExport(GOLDEN / NAME / "drafter", golden_artifacts[NAME], out), silent)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    damaged = changed_checkpoint(
        GOLDEN / NAME / "drafter", tmp_path / "c", tensors={"norm.weight": np.full(64, np.nan, np.float32)}
    )
    with pytest.raises(ExportError, match=r"norm\.weight: expected finite numbers, got NaN or infinity"):
        export_drafter(DrafterExport(damaged, golden_artifacts[NAME], out), silent)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_verifier_is_not_replaced(golden_artifacts, tmp_path):
    verifier = shutil.copytree(golden_artifacts[NAME], tmp_path / "v")
    with pytest.raises(ExportError, match=r"--out .*/v/\.\./v: expected a directory of its own, got the verifier's"):
        export_drafter(DrafterExport(GOLDEN / NAME / "drafter", verifier, verifier / ".." / "v"), silent)
    assert (verifier / "model.onnx").is_file()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_smaller_storage_gives_nearly_the_same_numbers(golden_artifacts, drafters, tmp_path, dtype):
    export_drafter(DrafterExport(GOLDEN / NAME / "drafter", golden_artifacts[NAME], tmp_path / "d", dtype), silent)
    files = [
        sum(file.stat().st_size for file in directory.iterdir() if file.suffix != ".json")
        for directory in (tmp_path / "d", drafters[NAME])
    ]
    assert files[0] < files[1]
    features, _ = text_of(NAME)
    round_ = next(golden_rounds(NAME))
    confidence = []
    for directory in (tmp_path / "d", drafters[NAME]):
        stage = OnnxRuntimeDrafter(directory, golden_artifacts[NAME], threads=1)
        stage.allocate(1, 64, ())
        context = context_rows(features, 0, round_.start, slot=0)
        batch = draft_batch(stage.artifact, context, [round_.anchor], [0], [round_.start])
        confidence.append(stage.draft(batch).confidence_logits)
    difference = np.abs(confidence[0] - confidence[1])[:, 0].max()
    assert 0 < difference < 0.05
