"""What the verifier's graph says of a row besides its logits: the best token, and whether the row is sound."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from artifacts import GOLDEN, export, golden_arrays
from safetensors.numpy import load_file, save_file

from dspark_backend.kv_cache import capacity_for
from dspark_backend.stages.artifact import STAGE_FILE
from dspark_backend.stages.batch import Segment, StepBatch, StepOutput
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

NAME = "qwen3_vanilla"


def output_of(artifact, token_ids) -> StepOutput:
    stage = OnnxRuntimeVerifier(artifact, threads=1)
    stage.allocate(1, capacity_for(len(token_ids)), ())
    return stage.step(StepBatch.pack([Segment(0, 0, token_ids, 0)]))


def changed_head(tmp_path, change):
    """The golden target with another LM head, exported."""
    shutil.copytree(GOLDEN / NAME / "target", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    tensors[name] = tensors[name].copy()
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    return export(tmp_path / "model", tmp_path / "artifact", target_layer_ids=(0, 2))


def test_it_is_the_largest_logit(golden_artifacts):
    output = output_of(golden_artifacts[NAME], golden_arrays(NAME)["prompt"].tolist())
    assert (output.argmax == output.logits.argmax(axis=1)).all()
    assert (output.top_logit == output.logits.max(axis=1)).all()


def damaged_head(artifact, out, token, value):
    """A copy of an artifact with one row of its LM head replaced: an export would refuse such a checkpoint."""
    shutil.copytree(artifact, out)
    stage = json.loads((out / STAGE_FILE).read_text())
    head = stage["head"]
    path = out / head["file"]
    stored = np.memmap(path, np.float32, "r+", head["offset"], tuple(head["shape"]))
    stored[token] = value
    stored.flush()
    stage["digests"][head["file"]] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / STAGE_FILE).write_text(json.dumps(stage))
    return out


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("token", [0, 150, 319])
def test_one_bad_logit_of_a_row_shows(golden_artifacts, tmp_path, value, token):
    output = output_of(damaged_head(golden_artifacts[NAME], tmp_path / "damaged", token, value), [1, 2, 3])
    bad = ~np.isfinite(output.logits)
    assert bad[:, token].all() and bad.sum() == 3
    # Infinity times a negative number may be a logit of -inf, which is legal.
    shows = ~np.isfinite(output.top_logit)
    assert (shows == (output.logits[:, token] != -np.inf)).all()


def test_of_equal_logits_the_first_token_is_best(tmp_path):
    def repeat(head):
        head[160:320] = head[:160]
        head[320:] = 0.0

    output = output_of(changed_head(tmp_path, repeat), golden_arrays(NAME)["prompt"].tolist())
    assert (output.logits[:, :160] == output.logits[:, 160:320]).all()
    assert (output.argmax == output.logits.argmax(axis=1)).all()
    assert (output.argmax < 160).all()
