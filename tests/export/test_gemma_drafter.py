"""Gemma 4 drafters beyond the golden one: values of their own, int8, and what is refused."""

from __future__ import annotations

import json

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
)
from safetensors.numpy import load_file

from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.drafter_spec import describe_drafter
from dspark_export.errors import ExportError
from dspark_export.torch_drafter import load_torch_drafter

NAME = "gemma4_vanilla"
SOURCE = GOLDEN / NAME / "drafter"
TOLERANCE = 1e-4


def values_of_their_own(folder):
    """The golden drafter with value projections, other layer scalars and without a cap."""
    random = np.random.default_rng(3)
    tensors = {
        f"layers.{layer}.self_attn.v_proj.weight": random.normal(scale=0.1, size=(64, 64)).astype(np.float32)
        for layer in range(2)
    }
    tensors |= {f"layers.{layer}.layer_scalar": np.array([0.7 + layer], np.float32) for layer in range(2)}
    return changed_checkpoint(SOURCE, folder, {"attention_k_eq_v": False, "final_logit_softcapping": None}, tensors)


def test_values_of_their_own(golden_artifacts, tmp_path):
    checkpoint = values_of_their_own(tmp_path / "c")
    export_golden_drafter("", golden_artifacts[NAME], tmp_path / "d", checkpoint)
    stage = OnnxRuntimeDrafter(tmp_path / "d", golden_artifacts[NAME], threads=1)
    embedding = torch.from_numpy(load_file(GOLDEN / NAME / "target" / "model.safetensors")["model.embed_tokens.weight"])
    module = load_torch_drafter(checkpoint, embedding, embedding).eval()
    features = golden_arrays(NAME)["target_features"]
    stage.allocate(1, 128, ())
    inner = bind_intermediates(stage, 1)
    for round_ in golden_rounds(NAME):
        context = context_rows(features, round_.first, round_.start, slot=0)
        output = stage.draft(draft_batch(stage.artifact, context, [round_.anchor], [0], [round_.start]))
        seen = torch.from_numpy(features[: round_.start])
        with torch.no_grad():
            expected = module(seen, torch.arange(round_.start), round_.anchor, round_.start)
        for key, values in (inner | {"confidence_logits": output.confidence_logits}).items():
            np.testing.assert_allclose(values, getattr(expected, key).numpy(), rtol=0, atol=TOLERANCE, err_msg=key)
        # The negative control: what was changed shows.
        assert np.abs(inner["hidden"][0] - round_.hidden).max() > 100 * TOLERANCE


def test_int8_is_close(golden_artifacts, tmp_path):
    for dtype in ("float32", "int8"):
        export_drafter(DrafterExport(SOURCE, golden_artifacts[NAME], tmp_path / dtype, dtype), silent)
    features, round_ = golden_arrays(NAME)["target_features"], next(golden_rounds(NAME))
    confidence = []
    for dtype in ("float32", "int8"):
        stage = OnnxRuntimeDrafter(tmp_path / dtype, golden_artifacts[NAME], threads=1)
        stage.allocate(1, 64, ())
        context = context_rows(features, 0, round_.start, slot=0)
        batch = draft_batch(stage.artifact, context, [round_.anchor], [0], [round_.start])
        confidence.append(stage.draft(batch).confidence_logits)
    assert 0 < np.abs(confidence[0] - confidence[1])[:, 0].max() < 0.1


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("layers.1.layer_scalar", None, r"layers\.1\.layer_scalar"),
        ("layers.0.pre_feedforward_layernorm.weight", None, r"pre_feedforward_layernorm"),
        ("layers.0.post_feedforward_layernorm.weight", np.ones(9, np.float32), r"of shape \(64,\), got \(9,\)"),
    ],
)
def test_missing_parts(golden_artifacts, tmp_path, tensor, value, message):
    checkpoint = changed_checkpoint(SOURCE, tmp_path / "c", None, {tensor: value})
    with pytest.raises(ExportError, match=message):
        export_drafter(DrafterExport(checkpoint, golden_artifacts[NAME], tmp_path / "d"), silent)


def test_windows_in_a_drafter_are_refused():
    config = json.loads((SOURCE / "config.json").read_text())
    config["layer_types"] = ["sliding_attention", "full_attention"]
    with pytest.raises(ExportError, match="layer_types: expected full_attention in every layer"):
        describe_drafter(config)
