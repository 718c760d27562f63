"""Engines of Qwen3-4B's true shape, a layer of it and the whole vocabulary: they build, the same bytes each time."""

from __future__ import annotations

import hashlib
import sys
import time

import pytest
import qwen3_4b

from dspark_backend.stages.engine_contract import Workload
from dspark_export.engine.builder import Builder, BuildSettings
from dspark_export.engine.worker import build_apart
from dspark_export.families import describe
from dspark_export.graph.drafter import DrafterGraph
from dspark_export.graph.standard_form import StandardForm
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.layouts import read_drafter
from dspark_export.quantization.fp8 import norm_scales

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu12==1.7.1.116")
pytestmark = pytest.mark.slow
WORK = Workload(4096, slots=1)
POSITIONS = WORK.max_context + WORK.block_size


def build(directory, profiles, targets):
    """Size and digest of the engine of ``graph.onnx``, which is not kept. No digest where builds may differ."""
    begin, engine = time.perf_counter(), directory / "engine"
    missing = build_apart(
        Builder("tensorrt_rtx", trt), directory / "graph.onnx", profiles, BuildSettings(targets), engine, lambda _: None
    )
    size = engine.stat().st_size
    with engine.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    engine.unlink()
    sys.stdout.write(f"{', '.join(targets)}: {time.perf_counter() - begin:.1f} s, {size / 2**20:.1f} MiB\n")
    return size, "" if missing else digest


def save_verifier(directory, products):
    weights = qwen3_4b.target(layers=1)
    decoder = describe(weights.config)
    scales = norm_scales(decoder, weights, "model.layers.") if products == "fp8" else {}
    form = StandardForm(WORK.capacity, products, scales)
    model = VerifierGraph(decoder, weights, (0,), WORK.max_context, "bfloat16", standard=form).build()
    save_graph(model, directory, "graph.onnx")


def test_the_verifier_in_bfloat16_and_again(tmp_path):
    save_verifier(tmp_path, "plain")
    built = [build(tmp_path, WORK.verifier_profiles(), ("sm86", "sm89")) for _ in range(2)]
    if built[0] != built[1]:  # other work on the machine can move one build of many
        built.append(build(tmp_path, WORK.verifier_profiles(), ("sm86", "sm89")))
    # A layer of 101 million weights; the embedding is an input.
    assert len(set(built)) < len(built) and built[0][0] > 100e6 * 2


def test_the_verifier_in_fp8(tmp_path):
    save_verifier(tmp_path, "fp8")
    size, _ = build(tmp_path, WORK.verifier_profiles(), ("sm89",))
    # 66 million of them behind a norm, in a byte each.
    assert 66e6 + 35e6 * 2 < size < 100e6 * 1.5


def test_the_verifier_in_int4(tmp_path):
    save_verifier(tmp_path, "int4")
    size, _ = build(tmp_path, WORK.verifier_profiles(), ("sm86", "sm89"))
    # Half a byte each, and two for every block of 64.
    assert 100e6 * (0.5 + 2 / 64) < size < 100e6


def drafter_graph():
    spec, weights = read_drafter(qwen3_4b.drafter(layers=1))
    assert (spec.block_size, spec.markov_rank, spec.draft_vocab_size) == (7, 256, 151936)
    return DrafterGraph(spec, weights, POSITIONS, "bfloat16", standard=StandardForm(WORK.capacity))


def test_the_drafters_context_in_bfloat16(tmp_path):
    save_graph(drafter_graph().build_context(), tmp_path, "graph.onnx")
    size, _ = build(tmp_path, WORK.context_profiles(), ("sm86", "sm89"))
    # The projection of the features, and one layer's keys and values.
    assert 2 * (5 * 2560 * 2560 + 2 * 1024 * 2560) < size < 2 * 50e6


def test_the_drafter_in_bfloat16(tmp_path):
    save_graph(drafter_graph().build_draft(), tmp_path, "graph.onnx")
    size, _ = build(tmp_path, WORK.draft_profiles(), ("sm86", "sm89"))
    # The projection of five layers' features, a layer, and the two factors of the Markov head.
    assert size > 2 * (5 * 2560 * 2560 + 100e6 + 2 * 151936 * 256)
