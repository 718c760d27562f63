"""Engines for TensorRT: every graph parses and builds ahead of time; what cannot be built is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import no_personality
import numpy as np
import onnx
import pytest
import tiny_models
from artifacts import GOLDEN, golden_taps, silent
from onnx import TensorProto, helper, numpy_helper
from standard_graphs import CAPACITY, drafter_graphs, drafter_tensors, fp8_scales, verifier_graph
from typer.testing import CliRunner

from dspark_backend.errors import ArtifactError, ConfigError
from dspark_backend.stages.artifact import load_drafter_artifact, load_verifier_artifact
from dspark_backend.stages.engine_contract import SAMPLER_ENGINE, VERIFIER_ENGINE, Profile, Range, Workload
from dspark_backend.stages.tensorrt.limits import check_engines
from dspark_backend.stages.tensorrt.profiles import engine_profiles
from dspark_export.cli import app
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.engine.builder import Builder, BuildSettings, build_engine, find_builder, parse_targets
from dspark_export.engine.stage import EngineExport, export_engine
from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.graph.standard_form import StandardForm
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.verifier import VerifierExport, export_verifier
from dspark_export.weights.safetensors_folder import SafetensorsFolder

trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu12==1.7.1.116")
NAME = "qwen3_gated"
SMALL = Workload(max_context=128, slots=1, block_size=5, prefill_chunk=16)
BOTH = ("sm86", "sm89")
FORMS = [
    ("float16", "float16", "plain", BOTH),
    ("bfloat16", "bfloat16", "plain", BOTH),
    ("fp8", "bfloat16", "fp8", ("sm89",)),
    ("int4", "bfloat16", "int4", BOTH),
]


def build(model, directory, profiles, targets):
    save_graph(model, directory, "graph.onnx")
    builder = Builder("tensorrt_rtx", trt)
    begin = time.perf_counter()
    data = build_engine(builder, directory / "graph.onnx", profiles, BuildSettings(targets), lambda _: None)
    sys.stdout.write(f"{directory.name}: {time.perf_counter() - begin:.1f} s, {len(data) / 2**20:.2f} MiB\n")
    return data


def scales_of(form, part):
    return fp8_scales(NAME, part) if form == "fp8" else {}


def forms_but(covered):
    """``covered`` is that of a whole stage below."""
    left = [pytest.param(*form, id=form[0]) for form in FORMS if form[0] != covered]
    return pytest.mark.parametrize(("form", "compute", "products", "targets"), left)


@forms_but("bfloat16")
def test_the_verifier_builds(tmp_path, form, compute, products, targets):
    weights = SafetensorsFolder(GOLDEN / NAME / "target")
    # Two layers show what six would.
    short = {"num_hidden_layers": 2, "layer_types": weights.config["layer_types"][:2]}
    standard = StandardForm(CAPACITY, products, scales_of(form, "target"))
    model = VerifierGraph(describe(weights.config | short), weights, (0,), 128, compute, standard=standard).build()
    types = {str(value.dtype) for value in model.graph.initializers.values()}
    assert ("FLOAT8E4M3FN" in types) == (form == "fp8") and ("INT4" in types) == (form == "int4")
    assert len(build(model, tmp_path, SMALL.verifier_profiles(), targets)) > 100_000


@forms_but("fp8")
def test_the_drafter_builds(tmp_path, form, compute, products, targets):
    form_options = {"products": products, "input_scales": scales_of(form, "drafter")}
    drafting, context = drafter_graphs(NAME, compute, expose=False, **form_options)
    work = dataclasses.replace(SMALL, block_size=drafter_tensors(NAME).block_size)
    for index, (model, profiles) in enumerate([(drafting, work.draft_profiles()), (context, work.context_profiles())]):
        (tmp_path / str(index)).mkdir()
        assert len(build(model, tmp_path / str(index), profiles, targets)) > 50_000


def test_gemma_with_its_wide_heads_builds(tmp_path):
    data = build(verifier_graph("gemma4_vanilla", "bfloat16"), tmp_path, SMALL.verifier_profiles(), BOTH)
    assert len(data) > 100_000


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_verifiers_of_the_other_families_build(tmp_path, name):
    # TensorRT has attention kernels for multiples of 16 channels.
    sizes = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    if name == "gemma3":
        sizes["layer_types"] = tiny_models.LAYER_TYPES[1:3]
    tiny_models.make(name, tmp_path / "model", **sizes)
    weights = SafetensorsFolder(tmp_path / "model")
    form = StandardForm(CAPACITY)
    model = VerifierGraph(describe(weights.config), weights, (0,), 128, "bfloat16", standard=form).build()
    assert len(build(model, tmp_path, SMALL.verifier_profiles(), BOTH)) > 50_000


@pytest.mark.parametrize("name", ["qwen3_rnn", "gemma4_vanilla"])
def test_drafters_with_other_heads_build(tmp_path, name):
    drafting, _ = drafter_graphs(name, "bfloat16", expose=False)
    work = dataclasses.replace(SMALL, block_size=drafter_tensors(name).block_size)
    assert len(build(drafting, tmp_path, work.draft_profiles(), BOTH)) > 50_000


def test_a_node_that_does_not_parse_is_named(tmp_path):
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["B"])
    found = helper.make_tensor_value_info("y", TensorProto.INT64, [1, "N"])
    node = helper.make_node("NonZero", ["x"], ["y"], name="places")
    graph = helper.make_graph([node], "g", [given], [found])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    with pytest.raises(ExportError, match=r"cannot parse.*NonZero places"):
        build_engine(Builder("tensorrt_rtx", trt), tmp_path / "g.onnx", [], BuildSettings(BOTH), lambda _: None)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_timing_cache_is_written(tmp_path):
    """``tensorrt_rtx`` keeps nothing in it."""
    given, found = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", 64]) for name in "xy")
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float16), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [given], [found], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    builder, profile, cache = Builder("tensorrt_rtx", trt), Profile("p", {"B": Range(1, 8, 16)}), tmp_path / "cache"
    settings = BuildSettings(("sm86",), timing_cache=cache)
    for before in (None, b"written by something else"):
        if before:
            cache.write_bytes(before)
        assert build_engine(builder, tmp_path / "g.onnx", [profile], settings, lambda _: None)
        assert cache.read_bytes() not in (b"", before)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Golden verifier and drafter, exported for TensorRT."""
    root = tmp_path_factory.mktemp("tensorrt")
    verifier = VerifierExport(
        str(GOLDEN / NAME / "target"), root / "v", "bfloat16", "tensorrt", golden_taps(NAME), max_context=128
    )
    export_verifier(verifier, silent)
    export_drafter(DrafterExport(GOLDEN / NAME / "drafter", root / "v", root / "d", "fp8", "tensorrt"), silent)
    return root


def test_a_drafters_stage_builds_whole_and_twice_the_same(stages, tmp_path):
    seen = []
    for name in ("one", "two"):
        options = EngineExport(stages / "d", tmp_path / name, "slots=1,prefill_chunk=8", "fp8", 1 << 30, None, "sm89")
        artifact, built = export_engine(options, lambda what, done: seen.append((what, done)))
    info = load_drafter_artifact(tmp_path / "two").engine
    assert info == artifact.engine
    assert info.builder == "tensorrt_rtx" and info.version == trt.__version__ and info.precision == "fp8"
    assert info.targets == ("sm89",) and [one.name for one in info.profiles] == ["draft", "draft_prompt", "context"]
    one = load_drafter_artifact(tmp_path / "one")
    assert one.files == load_drafter_artifact(tmp_path / "two").files
    # Where the system allows what that takes: the right to SCHED_FIFO, above all. Other work on the machine can still
    # move one build of many: then a third one says which.
    if one.engine != info and info.reproducible:
        options = EngineExport(
            stages / "d", tmp_path / "three", "slots=1,prefill_chunk=8", "fp8", 1 << 30, None, "sm89"
        )
        assert export_engine(options, silent)[0].engine in (one.engine, info)
    for one in built:
        data = (tmp_path / "two" / one.file).read_bytes()
        assert len(data) == one.size and hashlib.sha256(data).hexdigest() == info.engines[one.file]
    assert not list((tmp_path / "one").glob("*.onnx*"))
    assert {what for what, _ in seen} == {"build draft.engine", "build context.engine"}
    assert 0.0 < max(done for _, done in seen) <= 1.0
    # A damaged engine is refused when the stage is loaded.
    with (tmp_path / "one" / "draft.engine").open("r+b") as stream:
        stream.write(b"\0\0")
    with pytest.raises(ArtifactError, match=r"draft\.engine: expected the contents"):
        load_drafter_artifact(tmp_path / "one")


def test_the_stage_for_tensorrt_shares_embedding_and_head(stages):
    artifact = load_verifier_artifact(stages / "v")
    weights = SafetensorsFolder(GOLDEN / NAME / "target")
    assert artifact.runtime == "tensorrt" and artifact.embedding.dtype == "bfloat16"
    for place, name in ((artifact.embedding, "model.embed_tokens.weight"), (artifact.head, "lm_head.weight")):
        if name in weights.names():
            np.testing.assert_allclose(place.read(stages / "v"), weights.read(name), rtol=2**-8)
    assert artifact.engine.capacity == 128 + artifact.engine.padding and not artifact.engine.engines
    # Whatever drafter comes: with the default chunk of a prompt there is room for blocks of up to 16.
    assert artifact.engine.padding >= Workload(128, block_size=16).padding


def test_a_verifiers_stage_builds_whole_with_all_its_profiles(stages, tmp_path):
    """By the command, in a container that does not let a process fix its addresses: that costs the sameness alone."""
    work = Workload(128, slots=2, block_size=8, prefill_chunk=16)
    command = [
        sys.executable, no_personality.__file__, sys.executable, "-c", "from dspark_export.cli import main; main()",
        "engine", "--stage", stages / "v", "--out", tmp_path / "o", "--target", "sm86,sm89",
        "--profiles", "slots=2,block_size=8,prefill_chunk=16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stderr)
    assert re.search(r"verifier\.engine: \d+\.\d MiB, \d+\.\d s", done.stderr)
    assert "without address randomisation" in " ".join(done.stderr.split())
    artifact = load_verifier_artifact(tmp_path / "o")
    assert artifact.engine.targets == BOTH and artifact.engine.engines.keys() == {VERIFIER_ENGINE, SAMPLER_ENGINE}
    assert not artifact.engine.reproducible
    found = engine_profiles(artifact.engine, VERIFIER_ENGINE, tuple("BNRQC"))
    assert found == work.verifier_profiles() and len(found) > 2
    assert engine_profiles(artifact.engine, SAMPLER_ENGINE, ("N",)) == work.sampler_profiles()
    check_engines(artifact, None, 2, 16)
    with pytest.raises(ConfigError, match="max_slots: expected a profile"):
        check_engines(artifact, None, 20, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "sm86"}, "--target: fp8 needs a GPU from SM89 on, got sm86; .* --dtype float16, bfloat16 or int4$"),
        ({"target": "sm89,sm80"}, "--target: fp8 needs a GPU from SM89 on, got sm80"),
        ({"target": "sm99"}, r"--target: expected some of .*sm89.*, got 'sm99'"),
        ({"precision": "float16"}, "strongly typed, in fp8; for float16 export"),
        ({"profiles": "slots=0"}, "--profiles: expected such as slots=16.* got 'slots=0'"),
        ({"profiles": "rows=3"}, "got 'rows=3'"),
        ({"profiles": "prefill_chunk=4096"}, "have room for 5"),
        ({"profiles": "block_size=9"}, "the drafter's block_size is"),
    ],
)
def test_options_that_do_not_fit_are_refused(stages, tmp_path, change, message):
    with pytest.raises(ExportError, match=message):
        export_engine(dataclasses.replace(EngineExport(stages / "d", tmp_path / "o"), **change), silent)
    assert not (tmp_path / "o" / "stage.json").exists()


def test_a_stage_of_another_runtime_is_refused(golden_artifacts, tmp_path):
    result = CliRunner().invoke(
        app, ["engine", "--stage", str(golden_artifacts[NAME]), "--out", str(tmp_path / "o")], catch_exceptions=True
    )
    assert result.exit_code != 0
    assert "expected a stage exported with --runtime tensorrt, got one for onnxruntime" in str(result.exception)


def test_a_workspace_that_is_too_small_is_named(stages, tmp_path):
    options = EngineExport(stages / "d", tmp_path / "o", "slots=1,prefill_chunk=8", workspace=1, target="sm89")
    with pytest.raises(ExportError, match=r"--workspace may be too small.*workspace limit"):
        export_engine(options, silent)


def test_without_a_builder_the_package_is_named():
    with pytest.raises(ExportError, match="expected the package tensorrt or tensorrt_rtx, found neither"):
        find_builder(("no_such_builder", "nor_this_one"))


def test_tensorrt_itself_builds_for_its_own_gpu_alone():
    builder = Builder("tensorrt", SimpleNamespace())
    assert parse_targets("", builder, "fp8") == ()
    with pytest.raises(ExportError, match="builds for the GPU of this machine alone"):
        parse_targets("sm89", builder, "bfloat16")


def test_targets_fit_the_precision():
    builder = Builder("tensorrt_rtx", trt)
    for precision in ("bfloat16", "int4"):
        with pytest.raises(ExportError, match=f"{precision} needs a GPU from SM80 on, got sm75; .* --dtype float16$"):
            parse_targets("sm86,sm75", builder, precision)
    assert parse_targets("sm75", builder, "float16") == ("sm75",)
    assert parse_targets("", builder, "float16")[:2] == ("sm75", "sm80")
    assert parse_targets("", builder, "bfloat16")[:3] == ("sm80", "sm86", "sm89")
    assert parse_targets("", builder, "fp8")[0] == "sm89"


@pytest.mark.parametrize("graph", ["verifier.onnx", "sampler.onnx"])
def test_a_stage_that_lacks_a_graph_is_named(stages, tmp_path, graph):
    """One that was built already, or exported before there was such a graph."""
    shutil.copytree(stages / "v", tmp_path / "v")
    raw = json.loads((tmp_path / "v" / "stage.json").read_text())
    (tmp_path / "v" / graph).unlink()
    raw["files"].pop(graph)
    (tmp_path / "v" / "stage.json").write_text(json.dumps(raw))
    with pytest.raises(ExportError, match=rf"expected {graph}; was it built already\? build from the export, of this"):
        export_engine(EngineExport(tmp_path / "v", tmp_path / "o"), silent)
    assert not (tmp_path / "o" / VERIFIER_ENGINE).exists()


@pytest.mark.parametrize(("runtime", "dtype"), [("tensorrt", "int8"), ("tensorrt", "float32"), ("openvino", "int8")])
def test_precisions_without_a_graph_are_refused(tmp_path, runtime, dtype):
    with pytest.raises(ExportError, match="expected"):
        VerifierExport("m", tmp_path, dtype, runtime)
