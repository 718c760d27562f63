"""Low precision without a GPU: exported graphs, evaluated by ONNX's own reference, against float32's numbers.

The evaluator rounds after every operator to the dtype that the graph says, so that scales, zero points, blocks and axes
are those an engine is built from; an engine may keep more digits inside fused kernels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import pytest
from artifacts import GOLDEN, golden_arrays, golden_taps, silent
from drafters import changed_checkpoint, golden_rounds
from onnx import numpy_helper
from safetensors.numpy import load_file
from standard_graphs import (
    Caches,
    ReferenceSession,
    draft,
    drafter_graphs,
    drafter_tensors,
    fp8_scales,
    verify,
)

from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.stages.engine_contract import COMPUTE_DTYPES
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD
from dspark_export.quantization.quality import Quality, measure_quality
from dspark_export.verifier import VerifierExport, export_verifier

NAME = "qwen3_gated"
TOKENS = 24


@dataclass(frozen=True)
class Bound:
    """Most that a precision may be off: rms of the error over rms of the logits, and mean KL in nats."""

    error: float
    kl: float


BOUNDS = {
    "float16": Bound(0.003, 2e-6),
    "bfloat16": Bound(0.02, 1e-4),
    "fp8": Bound(0.08, 2e-3),
    "int4": Bound(0.25, 0.02),
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """The golden target with MLP channels that differ by up to 4096 times: the same function, so the same numbers, but
    scales that belong to other channels give others."""
    stored, tensors = load_file(GOLDEN / NAME / "target" / "model.safetensors"), {}
    random = np.random.default_rng(0)
    for name in stored:
        if name.endswith("mlp.up_proj.weight"):
            factors = np.exp2(random.integers(-6, 7, len(stored[name]))).astype(np.float32)
            down = name.replace("up_proj", "down_proj")
            tensors |= {name: stored[name] * factors[:, None], down: stored[down] / factors}
    return changed_checkpoint(GOLDEN / NAME / "target", tmp_path_factory.mktemp("uneven") / "target", tensors=tensors)


@pytest.fixture(scope="module")
def exported(uneven, tmp_path_factory):
    """Graph and shared matrices of a verifier's stage, by its dtype."""

    @cache
    def export(dtype):
        out = tmp_path_factory.mktemp("low") / dtype
        options = VerifierExport(
            str(uneven), out, dtype, "tensorrt", golden_taps(NAME), max_context=128, check=False,
            calibration_tokens=256, check_tokens=128,
        )  # fmt: skip
        export_verifier(options, silent)
        artifact = load_verifier_artifact(out)
        places = {SHARED_EMBEDDING: artifact.embedding, SHARED_HEAD: artifact.head}
        shared = {name: place.read(out).astype(compute_dtype(dtype)) for name, place in places.items()}
        return onnx.load(out / "verifier.onnx"), shared

    return export


def compute_dtype(dtype) -> np.dtype:
    name = COMPUTE_DTYPES[dtype]
    return np.dtype(getattr(ml_dtypes, name, name))


def compare(model, shared) -> tuple[float, Quality]:
    """Relative error of the logits of the golden text, in two chunks, and the distance of its distributions."""
    golden = golden_arrays(NAME)
    expected = golden["target_logits"][:TOKENS]
    tokens = [*golden["prompt"].tolist(), *golden["greedy"].tolist()][:TOKENS]
    caches = Caches(ReferenceSession(model), slots=1)
    parts = [
        verify(caches, shared, [(0, first, tokens[first:end])], view=end)["logits"]
        for first, end in ((0, TOKENS - 5), (TOKENS - 5, TOKENS))
    ]
    found = np.concatenate(parts)
    return relative(found, expected), measure_quality(lambda _: expected, lambda _: found, [tokens], lambda _: None)


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def changed(model, names, change):
    """A copy with other initializers; ``change`` takes and gives an array."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if names(tensor.name):
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    return copy


def neighbours_scales(model):
    """Every output channel has the scale of the one beside it."""
    return changed(model, lambda name: name.endswith(".scales"), lambda scales: np.roll(scales, 1, axis=-1))


def saturating_inputs(model):
    """Inputs of products whose scales leave no room for large ones."""
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    return changed(model, scales.__contains__, lambda scale: scale / np.asarray(64, scale.dtype))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_verifier_logits_stay_close(exported, dtype):
    error, quality = compare(*exported(dtype))
    sys.stdout.write(f"{dtype}: error {error:.4f}, KL {quality.kl:.2e}, top-1 {quality.top1:.1%}\n")
    assert error < BOUNDS[dtype].error and quality.kl < BOUNDS[dtype].kl


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("dtype", "spoil"), [("fp8", neighbours_scales), ("fp8", saturating_inputs), ("int4", neighbours_scales)]
)
def test_wrong_scales_would_be_seen(exported, dtype, spoil):
    model, shared = exported(dtype)
    error, quality = compare(spoil(model), shared)
    sys.stdout.write(f"{dtype}, {spoil.__name__}: error {error:.3f}, KL {quality.kl:.3f}\n")
    assert error > 2 * BOUNDS[dtype].error and quality.kl > 2 * BOUNDS[dtype].kl


@pytest.mark.parametrize("dtype", BOUNDS)
def test_drafter_logits_stay_close(dtype):
    """Of blocks whose context comes in one piece; the first slot's head too, before a draw may differ."""
    golden, compute = golden_arrays(NAME), COMPUTE_DTYPES[dtype]
    products = dtype if dtype in ("fp8", "int4") else "plain"
    scales = fp8_scales(NAME, "drafter") if dtype == "fp8" else {}
    drafting, _ = drafter_graphs(NAME, compute, products=products, input_scales=scales)
    target = load_file(GOLDEN / NAME / "target" / "model.safetensors")
    embedding = target["model.embed_tokens.weight"]
    shared = {SHARED_EMBEDDING: embedding, SHARED_HEAD: target.get("lm_head.weight", embedding)}
    shared = {name: value.astype(compute_dtype(dtype)) for name, value in shared.items()}
    session, block = ReferenceSession(drafting), drafter_tensors(NAME).block_size
    for round_ in list(golden_rounds(NAME))[:2]:
        found = draft(
            Caches(session, 1), shared, golden["target_features"], 0, round_.start, round_.anchor, 0, block
        )  # fmt: skip
        errors = {key: relative(found[key][0], getattr(round_, key)) for key in ("hidden", "base_logits")}
        errors["draft_logits"] = relative(found["draft_logits"][0, 0], round_.draft_logits[0])
        sys.stdout.write(f"{dtype}, round {round_.index}: {errors}\n")
        assert max(errors.values()) < BOUNDS[dtype].error
