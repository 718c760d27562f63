"""What the drafter's graph draws: bits that never depend on company, and the distribution that it states."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
from artifacts import GOLDEN, golden_arrays
from drafters import bind_intermediates, context_rows, draft_batch, export_golden_drafter
from scipy.stats import chisquare

from dspark_backend.request import SamplingParams
from dspark_backend.sampling import SamplingContext, target_distribution
from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter

NAMES = ("qwen3_vanilla", "qwen3_gated", "qwen3_rnn", "gemma4_vanilla")


@pytest.fixture(scope="module")
def drafters(golden_artifacts, tmp_path_factory):
    root = tmp_path_factory.mktemp("draws")
    for name in NAMES:
        export_golden_drafter(name, golden_artifacts[name], root / name)
    for dtype in ("float16", "bfloat16", "int8"):
        export_golden_drafter("qwen3_gated", golden_artifacts["qwen3_gated"], root / dtype, dtype=dtype)
    return {name: root / name for name in (*NAMES, "float16", "bfloat16", "int8")}


@dataclass(frozen=True)
class Request:
    """A request in the middle of its text."""

    start: int
    anchor: int
    uniforms: np.ndarray
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def requests_of(tokens, block, seed=0):
    random = np.random.default_rng(seed)
    settings = [(1.0, 1, 1.0, 0.0), (1.0, 64, 1.0, 0.0), (0.6, 20, 0.9, 0.0), (1.5, 64, 0.95, 0.02), (0.8, 5, 1.0, 0.1)]
    starts = [1, 7, 30, 44, 70, 12, 3, 59]
    return [
        Request(start, int(tokens[start]), random.random(block, dtype=np.float32), *settings[index % len(settings)])
        for index, start in enumerate(starts)
    ]


def joined(rows):
    return ContextRows(
        *(np.concatenate([getattr(row, key) for row in rows]) for key in ("features", "positions", "slots"))
    )


def batch_of(requests, slots, context):
    def column(key, kind):
        return np.array([getattr(request, key) for request in requests], dtype=kind)

    return DraftBatch(
        context=context,
        anchors=column("anchor", np.int64),
        slots=np.array(slots, dtype=np.int64),
        starts=column("start", np.int64),
        uniforms=np.stack([request.uniforms for request in requests]),
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int64),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
    )


def bits(output, row):
    return tuple(
        getattr(output, key)[row].tobytes() for key in ("tokens", "candidates", "probabilities", "confidence_logits")
    )


def cut(request, width):
    """The same request, drafted ``width`` tokens far."""
    return replace(request, uniforms=request.uniforms[:width])


def alone(directory, verifier, features, request):
    stage = OnnxRuntimeDrafter(directory, verifier, threads=1)
    stage.allocate(1, 96, ())
    context = context_rows(features, 0, request.start, slot=0)
    return bits(stage.draft(batch_of([request], [0], context)), 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", [*NAMES, "float16", "bfloat16", "int8"])
def test_bits_do_not_depend_on_company(golden_artifacts, drafters, kind, threads):
    """Random schedules: batch, order, slots, capacity, how the context came in, moved rows, blocks of several
    widths, and stale rows behind."""
    name = kind if kind in NAMES else "qwen3_gated"
    golden = golden_arrays(name)
    features, tokens = golden["target_features"], np.concatenate([golden["prompt"], golden["greedy"]])
    verifier = golden_artifacts[name]
    stage = OnnxRuntimeDrafter(drafters[kind], verifier, threads=threads)
    requests = requests_of(tokens, stage.artifact.block_size)
    widths = sorted({1, 2, stage.artifact.block_size})
    expected = [
        {width: alone(drafters[kind], verifier, features, cut(request, width)) for width in widths}
        for request in requests
    ]
    random = np.random.default_rng(7)
    for _ in range(25):
        count = int(random.integers(1, len(requests) + 1))
        chosen = random.choice(len(requests), count, replace=False)
        num_slots = int(random.integers(count, 12))
        slots = random.choice(num_slots, count, replace=False)
        stage.allocate(num_slots, int(random.choice([96, 100, 128, 257])), ())
        if random.random() < 0.5:
            # Somebody else's rows are still in the slots.
            noise = random.normal(size=(80, features.shape[1])).astype(np.float32)
            for slot in slots:
                stage.commit_context(context_rows(noise, 0, 80, int(slot)))
        last = []
        for index, slot in zip(chosen, slots, strict=True):
            start, done = requests[index].start, 0
            while done < start:
                step = int(random.integers(1, start - done + 1))
                rows = context_rows(features, done, done + step, int(slot))
                done += step
                if done < start or random.random() < 0.2:
                    stage.commit_context(rows)
                else:
                    last.append(rows)
        if random.random() < 0.3:
            moves = [RowMove(int(slot), int(slot), 90) for slot in slots]
            stage.allocate(num_slots + 1, 300, moves)
        nothing = context_rows(features, 0, 0, 0)
        context = joined([last[place] for place in random.permutation(len(last))] or [nothing])
        for width in random.choice(widths, 2).tolist():
            batch = batch_of([cut(requests[index], width) for index in chosen], slots, context)
            output = stage.draft(batch)
            for row, index in enumerate(chosen):
                assert bits(output, row) == expected[index][width], (index, width, chosen, slots)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("kind", NAMES)
def test_a_block_that_ends_early_is_that_of_a_drafter_with_such_blocks(
    golden_artifacts, drafters, tmp_path, kind, width
):
    settings = json.loads((GOLDEN / kind / "drafter" / "config.json").read_text())
    shutil.copytree(GOLDEN / kind / "drafter", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(settings | {"block_size": width}))
    export_golden_drafter("", golden_artifacts[kind], tmp_path / "short", checkpoint=tmp_path / "checkpoint")
    golden = golden_arrays(kind)
    features, tokens = golden["target_features"], np.concatenate([golden["prompt"], golden["greedy"]])
    for request in requests_of(tokens, settings["block_size"])[:3]:
        short, whole = cut(request, width), (drafters[kind], golden_artifacts[kind], features)
        drafted = alone(*whole, short)
        assert drafted == alone(tmp_path / "short", *whole[1:], short)
        # Not the beginning of a longer block: its slots look at each other.
        assert drafted[3] != alone(*whole, request)[3][: 4 * width]


def test_copied_rows_draft_the_same(golden_artifacts, drafters):
    golden = golden_arrays("qwen3_rnn")
    features, tokens = golden["target_features"], np.concatenate([golden["prompt"], golden["greedy"]])
    stage = OnnxRuntimeDrafter(drafters["qwen3_rnn"], golden_artifacts["qwen3_rnn"], threads=1)
    request = requests_of(tokens, stage.artifact.block_size)[3]
    expected = alone(drafters["qwen3_rnn"], golden_artifacts["qwen3_rnn"], features, request)
    stage.allocate(4, 96, ())
    stage.commit_context(context_rows(features, 0, request.start - 2, slot=0))
    stage.copy_rows(RowMove(0, 3, request.start - 2))
    context = context_rows(features, request.start - 2, request.start, slot=3)
    assert bits(stage.draft(batch_of([request], [3], context)), 0) == expected


def test_the_bits_are_not_always_the_same(golden_artifacts, drafters):
    """The negative control: another anchor, context row, position or uniform does show."""
    golden = golden_arrays("qwen3_vanilla")
    features, tokens = golden["target_features"], np.concatenate([golden["prompt"], golden["greedy"]])
    where = drafters["qwen3_vanilla"], golden_artifacts["qwen3_vanilla"]
    request = requests_of(tokens, 7)[1]
    base = alone(*where, features, request)
    nudged = features.copy()
    nudged[0, 0] = np.nextafter(nudged[0, 0], np.float32(9)) + np.float32(1e-3)
    assert alone(*where, nudged, request) != base
    for change in ({"anchor": request.anchor + 1}, {"start": request.start + 1}, {"temperature": 1.01}):
        assert alone(*where, features, Request(**{**vars(request), **change})) != base


@pytest.fixture(scope="module")
def many(golden_artifacts, drafters):
    """One request drafted in 64 slots at once: 64 independent blocks a run."""
    golden = golden_arrays("qwen3_gated")
    stage = OnnxRuntimeDrafter(drafters["qwen3_gated"], golden_artifacts["qwen3_gated"], threads=1)
    stage.allocate(64, 40, ())
    for slot in range(64):
        stage.commit_context(context_rows(golden["target_features"], 0, 25, slot))
    nothing = context_rows(golden["target_features"], 0, 0, 0)
    inner = bind_intermediates(stage, 64)

    def run(uniforms, **settings):
        batch = draft_batch(
            stage.artifact, nothing, [17] * 64, list(range(64)), [25] * 64, uniforms=uniforms, **settings
        )
        return stage.draft(batch)

    return stage, run, inner


# The random drafter's logits are nearly flat: temperatures far below 1 make distributions worth testing.
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 64},
        {"temperature": 0.05, "top_k": 64},
        {"temperature": 0.15, "top_k": 64, "top_p": 0.8},
        {"temperature": 0.03, "top_k": 7},
        {"temperature": 0.1, "top_k": 64, "min_p": 0.3},
    ],
)
def test_draws_follow_the_stated_probabilities(many, settings):
    """Each draw has the probability that q states for it, given the draws before: chi-square, 112,000 draws a case."""
    stage, run, _ = many
    random = np.random.default_rng(11)
    block, count = stage.artifact.block_size, stage.artifact.num_candidates
    # By the rank of the drawn token: expected counts are sums of the stated probabilities, slot by slot.
    drawn, expected = np.zeros((block, count)), np.zeros((block, count))
    first = np.zeros((2, stage.artifact.vocab_size))
    for _ in range(350):
        output = run(random.random((64, block), dtype=np.float32), **settings)
        hits = output.candidates == output.tokens[:, :, None]
        assert (hits.sum(axis=2) == 1).all()
        assert (output.probabilities[hits] > 0).all()
        np.testing.assert_allclose(output.probabilities.sum(axis=2), 1.0, atol=1e-5)
        drawn += hits.sum(axis=0)
        expected += output.probabilities.sum(axis=0)
        first[0] += np.bincount(output.tokens[:, 0], minlength=first.shape[1])
        np.add.at(first[1], output.candidates[:, 0], output.probabilities[:, 0])
    for observed, wanted in (*zip(drawn, expected, strict=True), first):
        assert _p_value(observed, wanted) > 1e-4
    # The negative control: the same counts against probabilities that are a little flatter.
    if settings["temperature"] < 1.0:
        flatter = expected[0] ** 0.7
        assert _p_value(drawn[0], flatter * (expected[0].sum() / flatter.sum())) < 1e-4


def _p_value(observed, expected):
    """Chi-square with the cells below 10 expected draws joined."""
    large = expected >= 10
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 10:
        observed = np.append(observed[:-2], observed[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    if len(expected) < 2:
        return 1.0
    return float(chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 17, 64])
@pytest.mark.parametrize("top_p", [0.2, 0.75, 0.97, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5])
def test_the_filters_mean_what_they_mean_for_the_target(many, temperature, top_k, top_p, min_p):
    """q equals the engine's own distribution of the draft logits, restricted to the K candidates."""
    stage, run, inner = many
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    output = run(np.random.default_rng(2).random((64, stage.artifact.block_size), dtype=np.float32), **settings)
    params = SamplingParams(**settings)
    for row, slot in ((0, 0), (1, 1), (2, 4)):
        logits = inner["draft_logits"][row, slot]
        restricted = np.full_like(logits, -np.inf)
        best = np.argsort(-logits, kind="stable")[: stage.artifact.num_candidates]
        restricted[best] = logits[best]
        expected = target_distribution(restricted, params, SamplingContext([], logits.size))
        stated = np.zeros(logits.size)
        stated[output.candidates[row, slot]] = output.probabilities[row, slot]
        np.testing.assert_allclose(stated, expected, rtol=0, atol=2e-6)
        assert ((stated > 0) == (expected > 0)).all()


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(many, uniform):
    _, run, _ = many
    uniforms = np.full((64, 5), uniform, dtype=np.float32)
    for settings in ({"top_k": 64}, {"top_k": 64, "temperature": 0.05}, {"top_k": 3}, {"top_k": 64, "top_p": 0.01}):
        output = run(uniforms, **settings)
        chosen = np.take_along_axis(
            output.probabilities, (output.candidates == output.tokens[:, :, None]).argmax(2)[:, :, None], axis=2
        )
        assert (chosen > 0).all()
        if uniform == 0.0:
            assert (output.tokens == output.candidates[:, :, 0]).all()
        tokens, probabilities = output.proposal(3, 2)
        assert len(tokens) == len(probabilities) >= 1 and (probabilities > 0).all()


def test_one_uniform_draws_one_slot(many):
    """The draw of a slot depends on no later uniform, and on its own one."""
    _, run, _ = many
    random = np.random.default_rng(5)
    uniforms = random.random((64, 5), dtype=np.float32)
    base = run(uniforms, top_k=64, temperature=2.0).tokens
    for slot in range(5):
        other = uniforms.copy()
        other[:, slot] = random.random(64, dtype=np.float32)
        changed = run(other, top_k=64, temperature=2.0).tokens
        assert (changed[:, :slot] == base[:, :slot]).all()
        assert (changed[:, slot] != base[:, slot]).any()
