"""The graph that ranks a verifier's logits, against numpy; as an engine in the sizes of real vocabularies."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from standard_graphs import ReferenceSession, open_graph

from dspark_backend.stages.engine_contract import MAX_RANKED, SamplerTensors, Workload
from dspark_export.engine.builder import Builder, BuildSettings, build_engine
from dspark_export.graph.sampler import sampler_graph
from dspark_export.graph.tape import save_graph


def check(run, logits, temperature):
    """ONNX takes the lower index of equal ones; the runtime does not count on it."""
    found = run(["ranked_ids", "ranked_logits", "exp_sum"], {"logits": logits, "temperature": temperature})
    count = min(MAX_RANKED, logits.shape[1])
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(found[0], order)
    np.testing.assert_array_equal(found[1], np.take_along_axis(logits, order, axis=1))
    scores = np.subtract(logits, logits.max(axis=1, keepdims=True), dtype=np.float64) / temperature[:, None]
    np.testing.assert_allclose(found[2], np.exp(scores).sum(axis=1), rtol=2e-6)


@pytest.mark.parametrize("size", [6, MAX_RANKED, 5000])
def test_ranks_and_sums(tmp_path, size):
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 4, (5, size)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, 1:] = -np.inf
    logits[3] = 7.0
    temperature = np.array([1.0, 0.7, 1e-20, 100.0, 0.01], dtype=np.float32)
    model = sampler_graph(size)
    check(open_graph(model, tmp_path, "sampler.onnx").run, logits, temperature)
    check(ReferenceSession(sampler_graph(size)).run, logits, temperature)


def test_names_and_shapes_are_the_contracts():
    graph = ir.to_proto(sampler_graph(1000)).graph
    found = {
        value.name: (
            str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))),
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in (*graph.input, *graph.output)
    }
    assert found == {spec.name: (spec.dtype, spec.dims) for spec in SamplerTensors(1000).specs}


@pytest.mark.parametrize("size", [384, 262_144])
def test_it_builds(tmp_path, size):
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu12==1.7.1.116")
    save_graph(sampler_graph(size), tmp_path, "sampler.onnx")
    profiles = Workload(max_context=128).sampler_profiles()
    settings = BuildSettings(("sm86", "sm89"))
    data = build_engine(
        Builder("tensorrt_rtx", trt), tmp_path / "sampler.onnx", profiles, settings, lambda _: None
    )  # fmt: skip
    assert len(data) > 5_000
    sys.stdout.write(f"{size}: {len(data)} bytes\n")
