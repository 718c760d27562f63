"""The int4 precision: GPTQ in blocks, the pass that runs a model layer by layer, and what an export does with both."""

from __future__ import annotations

import json
import re
import sys
from itertools import chain

import ml_dtypes
import numpy as np
import pytest
from artifacts import GOLDEN, GOLDEN_NAMES, golden_arrays, golden_taps, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from standard_graphs import CAPACITY, Caches, open_graph, target_of, verify
from typer.testing import CliRunner

from dspark_export.cli import app
from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.graph.linear import fused_weight
from dspark_export.graph.standard_form import StandardForm
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.quantization.int4 import INT4_BLOCK, compensated_int4, nearest_int4
from dspark_export.quantization.int4_weights import Int4Weights, RoundedSource, split_matrix
from dspark_export.quantization.layer_pass import embedded, end_run, layer_run
from dspark_export.quantization.plan import fused_parts
from dspark_export.quantization.quality import compare_logits
from dspark_export.quantization.round_model import rounded_model
from dspark_export.quantization.rounding import compensated_rounding
from dspark_export.quantization.texts import Texts
from dspark_export.verifier import VerifierExport, export_verifier
from dspark_export.weights.safetensors_folder import SafetensorsFolder

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FIXED = settings(derandomize=True, database=None, deadline=None, max_examples=40)
DAMPING = 0.01


def inputs(seed: int, size: int, rank: int) -> np.ndarray:
    """Rows [2 * size, size] that mostly lie in ``rank`` directions, with channels of different strength."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((rank, size)) * np.exp(random.standard_normal(size))
    rows = random.standard_normal((2 * size, rank)) @ mixing + 0.1 * random.standard_normal((2 * size, size))
    return rows.astype(np.float32)


def weighted_error(gram: np.ndarray, found: np.ndarray, matrix: np.ndarray) -> float:
    off = (found - matrix).astype(np.float64)
    return float((off * (gram.astype(np.float64) @ off)).sum())


def test_two_channels_by_hand():
    """H = 2.02 on the diagonal with its damping and 1 beside it. 0.4 becomes 0; the second weight takes over
    0.4 * 1 / 2.02, is 0.598, and so becomes 1 in steps of 1, and 1 in steps of 0.5."""
    gram = np.array([[2, 1], [1, 2]], dtype=np.float32)
    matrix = np.full((2, 1), 0.4, dtype=np.float32)
    for steps in ([1.0, 1.0], [1.0, 0.5]):
        scales = np.array(steps, dtype=np.float32)[:, None]
        assert compensated_rounding(matrix, scales, gram, (-8, 7)).ravel().tolist() == [0, 1]
    # The liveliest channel goes first, and steps stay with their channels: 0.4 is nearer to 0.5 than to 0.
    gram = np.array([[2, 1], [1, 4]], dtype=np.float32)
    assert compensated_rounding(matrix, np.array([[1.0], [0.5]], np.float32), gram, (-8, 7)).ravel().tolist() == [0, 1]
    # 9 does not fit: 7 is left, and the other channel makes up for what was cut off, as far as it can.
    matrix = np.array([[9.0], [0.0]], dtype=np.float32)
    gram = np.array([[4, 1], [1, 2]], dtype=np.float32)
    assert compensated_rounding(matrix, np.ones((2, 1), np.float32), gram, (-8, 7)).ravel().tolist() == [7, 1]


@FIXED
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([64, 128, 192]), rank=st.integers(1, 192))
def test_never_worse_than_the_nearest(seed, size, rank):
    rows = inputs(seed, size, rank)
    gram, matrix = rows.T @ rows, np.random.default_rng(seed).standard_normal((size, 16)).astype(np.float32)
    nearest, found = nearest_int4(matrix, BFLOAT16), compensated_int4(matrix, gram, BFLOAT16)
    assert weighted_error(gram, found.dequantised(), matrix) <= weighted_error(gram, nearest.dequantised(), matrix)
    for each in (nearest, found):
        assert each.values.dtype == np.int8 and each.values.min() >= -8 and each.values.max() <= 7
        assert each.scales.shape == (size // INT4_BLOCK, 16) and each.scales.dtype == BFLOAT16
        assert (each.scales > 0).all()


@FIXED
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([4, 40, 150]), runs=st.sampled_from([1, 2]))
def test_the_error_is_within_what_theory_says(seed, size, runs):
    """Where nothing is clipped, channel i adds at most (step / 2 / U[i, i])**2, U.T @ U being the inverse of H."""
    rows = inputs(seed, size, size // 2)
    gram, random = rows.T @ rows, np.random.default_rng(seed)
    matrix = random.standard_normal((size, 5)).astype(np.float32)
    scales = random.uniform(0.1, 1.0, (runs, 5)).astype(np.float32)
    steps = np.repeat(scales, size // runs, axis=0)
    values = compensated_rounding(matrix, scales, gram, (-127, 127))
    damped = gram + DAMPING * np.diag(gram).mean() * np.eye(size)
    order = np.argsort(-np.diag(gram), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)].astype(np.float64))).T
    bound = (np.square(steps[order] / 2) / np.square(np.diag(upper))[:, None]).sum()
    assert np.abs(values).max() < 127
    assert weighted_error(damped, values * steps, matrix) <= bound * 1.001


def test_without_correlation_blocks_are_rounded_to_the_nearest():
    matrix = np.random.default_rng(2).standard_normal((192, 6)).astype(np.float32)
    found = compensated_int4(matrix, np.eye(192, dtype=np.float32), BFLOAT16)
    steps = np.repeat(found.scales.astype(np.float32), INT4_BLOCK, axis=0)
    assert (found.values == np.clip(np.rint(matrix / steps), -8, 7)).all()
    # And the scales are no worse than those that clip nothing.
    nearest = nearest_int4(matrix, BFLOAT16)
    assert np.square(found.dequantised() - matrix).sum() < np.square(nearest.dequantised() - matrix).sum()


def test_a_channel_that_is_never_lit_and_a_block_of_zeros():
    matrix = np.random.default_rng(3).standard_normal((128, 4)).astype(np.float32)
    matrix[:64, 1] = 0.0
    rows = inputs(3, 128, 100)
    rows[:, [5, 77]] = 0.0
    found = compensated_int4(matrix, rows.T @ rows, BFLOAT16).dequantised()
    assert np.isfinite(found).all() and np.abs(found[:64, 1]).max() < 1e-9


def test_what_was_put_is_read_again(tmp_path):
    matrix = np.random.default_rng(4).standard_normal((128, 6)).astype(np.float32)
    store, given_ = Int4Weights(tmp_path), nearest_int4(matrix, BFLOAT16)
    store.put("a+b", given_)
    found = store.read("a+b")
    assert "a+b" in store and "a" not in store
    assert (found.values == given_.values).all()
    assert found.scales.dtype == BFLOAT16 and (found.scales == given_.scales).all()


def target(name):
    weights = SafetensorsFolder(GOLDEN / name / "target")
    return describe(weights.config), weights


def layer_by_layer(decoder, weights, texts, scratch):
    """Logits of all texts, one after the other."""
    streams, longest = embedded(decoder, weights, texts), max(map(len, texts))
    for layer in range(decoder.num_layers):
        with layer_run(decoder, weights, layer, longest, scratch) as run:
            streams = [run.stream(stream) for stream in streams]
    with end_run(decoder, weights, scratch) as logits:
        return [logits(stream) for stream in streams]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_layers_one_by_one_are_the_model(name, tmp_path):
    golden = golden_arrays(name)
    tokens = [*golden["prompt"].tolist(), *golden["greedy"].tolist()][: len(golden["target_logits"])]
    (found,) = layer_by_layer(*target(name), [tokens], tmp_path)
    np.testing.assert_allclose(found, golden["target_logits"][: len(tokens)], atol=1e-4)
    assert not list(tmp_path.iterdir())


def test_the_pass_beats_the_nearest_on_other_text(tmp_path):
    """Its quality is that of the model with its weights, found by another way."""
    decoder, weights = target("qwen3_gated")
    golden, random = golden_arrays("qwen3_gated"), np.random.default_rng(0)
    text = [*golden["prompt"].tolist(), *golden["greedy"].tolist()]
    texts = Texts([random.integers(320, size=96).tolist() for _ in range(6)], [text, [*reversed(text)]])
    exact = layer_by_layer(decoder, weights, texts.held_out, tmp_path)
    with rounded_model(decoder, weights, texts, "bfloat16", tmp_path, silent) as model:
        names = list(model.weights.names)
        fitted, nearest = {}, {}
        for name in names:
            fitted |= split_matrix(name, model.weights.read(name).dequantised(), weights)
            matrix = fused_weight(weights, fused_parts(name))
            nearest |= split_matrix(name, nearest_int4(matrix, BFLOAT16).dequantised(), weights)
        quality = model.quality
        form = StandardForm(CAPACITY, "int4", rounded=model.weights)
        graph = VerifierGraph(decoder, weights, (0,), 128, "float32", standard=form).build()
        session = open_graph(graph, tmp_path, "graph.onnx")
    # The graph for TensorRT has just these weights.
    (expected,) = layer_by_layer(decoder, RoundedSource(weights, fitted), [text], tmp_path)
    shared = target_of("qwen3_gated")[2]
    logits = verify(Caches(session, slots=1), shared, [(0, 0, text)], view=len(text))["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # Six layers of three products with whole blocks; the down projection's 160 channels fill none.
    assert len(names) == 18 and {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "graph.onnx.data"}

    def judged(arrays):
        source = RoundedSource(weights, arrays)
        return compare_logits(zip(exact, layer_by_layer(decoder, source, texts.held_out, tmp_path), strict=True))

    again, plain = judged(fitted), judged(nearest)
    sys.stdout.write(f"gptq {quality.kl:.5f}, nearest {plain.kl:.5f}\n")
    assert quality.tokens == again.tokens == 2 * len(text)
    assert quality.kl == pytest.approx(again.kl, rel=1e-3) and quality.top1 == again.top1
    assert quality.kl < 0.8 * plain.kl


OPTIONS = (
    "verifier", "--model", GOLDEN / "qwen3_gated" / "target", "--runtime", "tensorrt", "--dtype", "int4",
    "--target-layer-ids", ",".join(map(str, golden_taps("qwen3_gated"))), "--max-context", 128,
    "--calibration-tokens", 256, "--check-tokens", 128,
)  # fmt: skip


def exported(out, *more):
    """What the command printed, and digests of what it wrote."""
    result = CliRunner().invoke(app, [*map(str, chain(OPTIONS, ("--out", out), more))])
    assert result.exit_code == 0, result.output
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    return " ".join(result.output.split()), json.loads((out / "stage.json").read_text())["digests"]


def test_the_command_rounds_by_gptq_the_same_each_time(tmp_path):
    printed, digests = exported(tmp_path / "a")
    assert re.search(r"int4 against float32 on 128 held-out tokens: KL 0\.\d{4}, same most probable token at", printed)
    assert exported(tmp_path / "b")[1] == digests
    printed, nearest = exported(tmp_path / "c", "--rounding", "nearest")
    assert "against float32" not in printed and nearest.keys() == digests.keys()
    assert nearest["verifier.onnx.data"] != digests["verifier.onnx.data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up", "dtype": "int4"}, "--rounding: expected gptq or nearest, got 'up'"),
        ({"rounding": "nearest", "dtype": "fp8"}, "--rounding nearest: expected --dtype int4, got fp8"),
        ({"calibration_tokens": 0, "dtype": "int4"}, "--calibration-tokens: expected at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_verifier(VerifierExport("smollm2-135m", tmp_path, runtime="tensorrt", **options), silent)
