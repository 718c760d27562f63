"""The int8 precision: its rounding, the choices of its calibration, and the graphs it gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
from artifacts import GOLDEN, export, golden_taps, silent
from drafters import changed_checkpoint, export_golden_drafter
from safetensors.numpy import load_file

from dspark_backend.stages import processor
from dspark_backend.stages.artifact import load_verifier_artifact
from dspark_backend.stages.int8 import LEVELS, int8_matrix
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.check import draft_once, prompt_logits
from dspark_export.errors import ExportError
from dspark_export.quantization.activations import InputStatistics
from dspark_export.quantization.choose import choose, rounded_rows, smoothing
from dspark_export.quantization.quality import measure_quality
from dspark_export.quantization.rounding import compensated_rounding
from dspark_export.quantization.texts import read_texts
from dspark_export.tokenizer_info import TokenizerInfo
from dspark_export.verifier import VerifierExport, export_verifier

NO_TOKENIZER = TokenizerInfo(
    bos_token_id=None, eos_token_ids=(), add_bos=None, chat_template=None, bos_token=None, eos_token=None
)


def error(rows: np.ndarray, rounded: np.ndarray, exact: np.ndarray) -> float:
    return float(np.square(rows @ rounded - rows @ exact).sum())


def correlated_rows(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    mixing = random.standard_normal((size // 4, size)) * np.exp(random.standard_normal(size))
    return (random.standard_normal((count, size // 4)) @ mixing + 0.05 * random.standard_normal((count, size))).astype(
        np.float32
    )


def test_nearest_rounding_is_within_half_a_step():
    random = np.random.default_rng(0)
    matrix = random.standard_normal((40, 30)).astype(np.float32) * np.exp(random.standard_normal(30)).astype(np.float32)
    matrix[:, 7] = 0.0
    found = int8_matrix(matrix)
    assert found.values.dtype == np.int8
    assert np.abs(found.values).max() == LEVELS
    assert (np.abs(found.values * found.scales - matrix) <= 0.5001 * found.scales).all()
    assert not found.values[:, 7].any()
    assert np.isfinite(found.scales).all()


@pytest.mark.parametrize("size", [24, 150])
def test_compensated_rounding_is_better_on_new_rows_of_the_same_kind(size):
    random = np.random.default_rng(1)
    rows = correlated_rows(random, 2000, size)
    matrix = random.standard_normal((size, 50)).astype(np.float32)
    plain = int8_matrix(matrix)
    fit, judged = rows[:1500], rows[1500:]
    values = compensated_rounding(matrix, plain.scales, fit.T @ fit)
    assert values.dtype == np.int8
    assert np.abs(values).max() <= LEVELS
    nearest = error(judged, plain.values * plain.scales, matrix)
    assert error(judged, values * plain.scales, matrix) < 0.5 * nearest


def test_without_correlation_compensated_rounding_is_the_nearest():
    random = np.random.default_rng(2)
    matrix = random.standard_normal((70, 20)).astype(np.float32)
    plain = int8_matrix(matrix)
    assert (compensated_rounding(matrix, plain.scales, np.eye(70, dtype=np.float32)) == plain.values).all()


def test_two_digits_are_finer_by_two_orders():
    rows = np.random.default_rng(3).standard_normal((50, 64)).astype(np.float32)
    rows[:, 5] *= 1000
    rows[3] = 0.0
    unit = np.abs(rows).max(axis=1, keepdims=True) / LEVELS
    one, two = (np.abs(rounded_rows(rows, digits) - rows) for digits in (False, True))
    assert (one <= 0.501 * unit).all()
    assert (two <= 0.501 * unit / (2 * LEVELS)).all()
    assert one.max() > 50 * two.max()


def test_smoothing_moves_outliers_into_the_weights():
    random = np.random.default_rng(4)
    rows = random.standard_normal((300, 64)).astype(np.float32)
    rows[:, [3, 40]] *= 100
    matrix = random.standard_normal((64, 80)).astype(np.float32)
    statistics = InputStatistics(np.abs(rows).max(axis=0), rows[:100], rows.T @ rows)
    plan = choose(statistics, matrix)
    assert plan.smoothing is not None
    assert set(np.argsort(plan.smoothing)[-2:]) == {3, 40}
    assert plan.gram is not None
    np.testing.assert_allclose(plan.gram, (rows / plan.smoothing).T @ (rows / plan.smoothing), rtol=1e-3, atol=1e-2)


def test_only_uneven_rows_take_two_digits():
    random = np.random.default_rng(5)
    matrix = random.standard_normal((512, 64)).astype(np.float32)
    even = random.standard_normal((200, 512)).astype(np.float32)
    # Heavy tails that differ from row to row: no factor of a channel helps.
    uneven = even * np.exp(1.5 * random.standard_normal((200, 512)).astype(np.float32))
    for rows, expected in ((even, False), (uneven, True)):
        statistics = InputStatistics(np.abs(rows).max(axis=0), rows, None)
        assert choose(statistics, matrix).two_digits is expected


def test_heads_of_a_group_share_their_factors():
    random = np.random.default_rng(6)
    largest, matrix = np.exp(random.standard_normal(48)), random.standard_normal((48, 10))
    factors = smoothing(largest.astype(np.float32), matrix.astype(np.float32), 0.5, shared=8, group=3)
    heads = factors.reshape(2, 3, 8)
    assert (heads == heads[:, :1]).all()
    assert len(np.unique(factors)) == 16


def test_quality_of_equal_and_of_other_logits():
    texts = [[0, 1, 2], [3, 4]]
    random = np.random.default_rng(7)
    table = random.standard_normal((5, 9)).astype(np.float32)
    same = measure_quality(lambda ids: table[ids], lambda ids: table[ids] + 3.0, texts, lambda done: None)
    assert same.tokens == 5
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert same.top1 == 1.0
    other = measure_quality(lambda ids: table[ids], lambda ids: -table[ids], texts, lambda done: None)
    assert other.kl > 0.1
    assert other.top1 == 0.0
    # By hand: two tokens, p = (1/2, 1/2), q = (1/4, 3/4).
    logits = {0: np.zeros((1, 2), np.float32), 1: np.log(np.array([[1.0, 3.0]], np.float32))}
    found = measure_quality(lambda ids: logits[0], lambda ids: logits[1], [[0]], lambda done: None)
    assert found.kl == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_texts_of_the_package_are_disjoint(smollm2_artifact, tmp_path):
    artifact = load_verifier_artifact(smollm2_artifact, check_contents=False)
    info = TokenizerInfo(
        bos_token_id=artifact.bos_token_id,
        eos_token_ids=artifact.eos_token_ids,
        add_bos=artifact.add_bos,
        chat_template=artifact.chat_template,
        bos_token=artifact.bos_token,
        eos_token=artifact.eos_token,
    )
    texts = read_texts(None, smollm2_artifact, info, artifact.vocab_size, 4000, 20_000, 8192)
    assert 4000 <= sum(map(len, texts.calibration)) < 4600
    assert sum(map(len, texts.held_out)) == 20_000
    assert not {tuple(text[:60]) for text in texts.calibration} & {tuple(text[:60]) for text in texts.held_out}
    with pytest.raises(ExportError, match="expected more than 100000 tokens"):
        read_texts(None, smollm2_artifact, info, artifact.vocab_size, 100_000, 20_000, 8192)


def test_texts_without_a_tokenizer_are_ids(tmp_path):
    texts = read_texts(None, tmp_path, NO_TOKENIZER, 77, 300, 200, 50)
    assert sum(map(len, texts.held_out)) == 200
    assert all(len(text) <= 50 and min(text) >= 0 and max(text) < 77 for text in texts.calibration + texts.held_out)


@pytest.fixture(scope="module")
def pair(golden_artifacts, tmp_path_factory):
    """A golden target in float32 and in int8."""
    name = "qwen3_vanilla"
    out = tmp_path_factory.mktemp("int8") / "artifact"
    exported = export_verifier(
        VerifierExport(
            str(GOLDEN / name / "target"), out, dtype="int8", target_layer_ids=golden_taps(name), check_tokens=1000
        ),
        silent,
    )
    return golden_artifacts[name], out, exported


def test_a_small_target_in_int8(pair):
    plain, out, exported = pair
    assert exported.artifact.dtype == "int8"
    assert exported.quality.tokens == 1000
    assert 0 < exported.quality.kl < 0.01
    assert exported.quality.top1 > 0.9
    stages = [OnnxRuntimeVerifier(directory, 1) for directory in (plain, out)]
    ids = np.random.default_rng(8).integers(0, exported.artifact.vocab_size, 64).tolist()
    exact, found = (prompt_logits(stage, ids, 64) for stage in stages)
    relative = np.square(found - exact).sum() / np.square(exact).sum()
    assert 0 < relative < 1e-2
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_processors_without_vnni_give_the_same_bits(pair, tmp_path, monkeypatch):
    """They take another kernel, on unsigned weights; sums are exact in both."""
    _, verifier, _ = pair
    export_golden_drafter("qwen3_vanilla", verifier, tmp_path / "drafter", dtype="int8")
    ids = np.random.default_rng(9).integers(0, 64, 40).tolist()
    found = []
    for flags in ({"avx2"}, {"avx2", "avx512_vnni"}):
        monkeypatch.setattr(processor, "processor_flags", lambda flags=flags: frozenset(flags))
        stage = OnnxRuntimeVerifier(verifier, 1)
        logits = prompt_logits(stage, ids, 8)
        drafter = OnnxRuntimeDrafter(tmp_path / "drafter", verifier, 1)
        found.append((logits.tobytes(), draft_once(drafter, 24).confidence_logits.tobytes()))
    assert processor.int8_saturates() is False
    assert found[0] == found[1]


def test_weights_are_stored_small(pair):
    plain, out, _ = pair
    graph = {folder: (folder / "model.onnx.data").stat().st_size for folder in (plain, out)}
    embedding = load_verifier_artifact(out).embedding
    table = 4 * int(np.prod(embedding.shape))
    assert graph[out] - table < 0.3 * (graph[plain] - table)


def test_an_untied_head_is_kept_for_drafters(pair):
    plain, out, exported = pair
    config = json.loads((GOLDEN / "qwen3_vanilla" / "target" / "config.json").read_text())
    expected = load_verifier_artifact(plain).head.read(plain)
    found = exported.artifact.head.read(out)
    assert found.shape == expected.shape
    if not config.get("tie_word_embeddings", False):
        assert exported.artifact.head.dtype == "bfloat16"
    np.testing.assert_allclose(found, expected, rtol=2**-8)


def test_a_row_of_zeros_gives_zeros(tmp_path):
    """A token whose embedding is zero: its scale is 0, and nothing of it may become NaN."""
    source = GOLDEN / "qwen3_vanilla" / "target"
    table = load_file(source / "model.safetensors")["model.embed_tokens.weight"].copy()
    table[5] = 0.0
    model = changed_checkpoint(source, tmp_path / "model", tensors={"model.embed_tokens.weight": table})
    out = export(model, tmp_path / "artifact", dtype="int8", check_tokens=100)
    assert np.isfinite(prompt_logits(OnnxRuntimeVerifier(out, 1), [5, 5, 9, 5], 2)).all()


@pytest.mark.parametrize("option", ["calibration_tokens", "check_tokens"])
def test_numbers_of_tokens_are_checked(tmp_path, option):
    with pytest.raises(ExportError, match=f"--{option.replace('_', '-')}: expected at least 1, got 0"):
        VerifierExport("smollm2-135m", tmp_path, **{option: 0})
