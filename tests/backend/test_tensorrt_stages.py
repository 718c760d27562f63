"""The TensorRT stages on a device of host memory, whose engines are the exported graphs, against the CPU's stages.

Everything but the calls of TensorRT and CUDA: buffers, profiles, scatter plans, graphs, hand-over of features.
"""

from __future__ import annotations

import dataclasses
import itertools

import artifacts
import numpy as np
import pytest
from drafters import context_rows, draft_batch, export_golden_drafter, golden_rounds
from engines import ids, prompt
from host_device import HostDevice
from host_engines import HostOpener
from speculation import CHEAP, SpeculatingDriver

from dspark_backend import runner
from dspark_backend.calibration import Calibration
from dspark_backend.config import EngineConfig
from dspark_backend.engine import Engine
from dspark_backend.errors import ArtifactError, ConfigError, InternalError
from dspark_backend.profile_grid import ProfilePlan
from dspark_backend.profiling import measure
from dspark_backend.scoring import score
from dspark_backend.speculation import Drafting
from dspark_backend.stages.batch import RowMove, Segment, StepBatch
from dspark_backend.stages.cuda.rows import DeviceRows
from dspark_backend.stages.draft_batch import ContextRows
from dspark_backend.stages.engine_contract import (
    COMPUTE_DTYPES,
    DRAFT_ENGINE,
    MAX_RANKED,
    SAMPLER_ENGINE,
    VERIFIER_ENGINE,
)
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_backend.stages.rows import joined
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING
from dspark_backend.stages.tensorrt.limits import check_engines
from dspark_backend.stages.tensorrt.plan import ITEM_BYTES
from dspark_backend.stages.tensorrt_drafter import TensorRtDrafter
from dspark_backend.stages.tensorrt_verifier import TensorRtVerifier
from dspark_export.drafter import DrafterExport, export_drafter

NAME = "qwen3_vanilla"
TOLERANCE = 0.03
"""float16 against float32."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")
    verifier = artifacts.export(
        artifacts.GOLDEN / NAME / "target", root / "v", dtype="float16", runtime="tensorrt",
        target_layer_ids=artifacts.golden_taps(NAME), max_context=256,
    )  # fmt: skip
    options = DrafterExport(artifacts.GOLDEN / NAME / "drafter", verifier, root / "d", "float16", runtime="tensorrt")
    export_drafter(options, artifacts.silent)
    return verifier, root / "d"


@pytest.fixture
def opener():
    return HostOpener(HostDevice())


@pytest.fixture
def verifier(exported, opener):
    return TensorRtVerifier(exported[0], StageSettings(), opener)


@pytest.fixture
def reference(golden_artifacts):
    return OnnxRuntimeVerifier(golden_artifacts[NAME], 1)


def both(verifier, reference, *segments: Segment):
    batch = StepBatch.pack(segments)
    found, expected = verifier.step(batch), reference.step(batch)
    np.testing.assert_allclose(np.asarray(found.logits), expected.logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(found.features), expected.features, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.top_logit, expected.top_logit, rtol=0, atol=TOLERANCE)
    assert found.argmax.tolist() == np.asarray(found.logits).argmax(axis=1).tolist()
    return found


def allocate(stages, *arguments) -> None:
    for stage in stages:
        stage.allocate(*arguments)


def test_ragged_steps_in_changing_slots(verifier, reference):
    stages, rng = (verifier, reference), np.random.default_rng(0)
    allocate(stages, 8, 128, ())
    texts = {slot: rng.integers(0, 300, 60).tolist() for slot in (1, 4, 6)}
    both(verifier, reference, Segment(4, 0, texts[4][:23], 22))
    both(verifier, reference, Segment(1, 0, texts[1][:50], 50), Segment(6, 0, texts[6][:9], 0))
    both(verifier, reference, *[Segment(slot, start, texts[slot][start : start + n], 0)
                                for slot, start, n in ((6, 9, 1), (1, 50, 6), (4, 23, 8))])  # fmt: skip
    # Rejected drafts are written over; neighbours keep their rows.
    both(verifier, reference, Segment(4, 25, texts[4][30:33], 0))
    both(verifier, reference, Segment(1, 53, [7], 0), Segment(6, 10, [8, 9], 0), Segment(4, 28, [1], 0))
    for stage in stages:
        stage.copy_rows(RowMove(4, 0, 28))
        stage.clear_rows(6)
    both(verifier, reference, Segment(0, 28, [1, 2], 0))
    allocate(stages, 3, 256, [RowMove(1, 0, 53), RowMove(0, 1, 30)])
    both(verifier, reference, Segment(0, 53, [3, 4], 0), Segment(1, 30, [5], 0), Segment(2, 0, [6, 7, 8], 0))


def test_more_slots_keep_what_survives(verifier, reference):
    allocate((verifier, reference), 1, 128, ())
    both(verifier, reference, Segment(0, 0, list(range(20)), 0))
    allocate((verifier, reference), 9, 128, [RowMove(0, 8, 20)])
    both(verifier, reference, Segment(8, 20, [3, 4], 0), Segment(0, 0, [9], 0))


def test_graphs_answer_as_plain_runs(verifier, reference, opener):
    allocate((verifier, reference), 4, 128, ())
    both(verifier, reference, Segment(0, 0, list(range(30)), 30), Segment(1, 0, list(range(9)), 9))
    for turn in range(6):
        both(verifier, reference, Segment(0, 30 + turn, [turn, 5], 0), Segment(1, 9 + turn, [turn + 1, 6], 0))
    assert opener.device.launches == 4, "one plain run, one capture, then the graph"
    # Another view of the cache is another graph; the first one still holds.
    both(verifier, reference, Segment(2, 0, [1, 2], 0), Segment(3, 0, [3, 4], 0))
    both(verifier, reference, Segment(0, 36, [1, 5], 0), Segment(1, 15, [1, 6], 0))
    assert opener.device.launches == 5


def test_caches_that_moved_end_their_graphs(verifier, reference, opener):
    allocate((verifier, reference), 1, 128, ())
    for turn in range(4):
        both(verifier, reference, Segment(0, turn, [turn], 0))
    assert opener.device.graphs
    allocate((verifier, reference), 5, 128, [RowMove(0, 0, 4)])
    assert not opener.device.graphs
    both(verifier, reference, Segment(0, 4, [9], 0))


def test_only_small_outputs_come_back(verifier, opener):
    verifier.allocate(4, 128, ())
    verifier.step(StepBatch.pack([Segment(0, 0, list(range(8)), 0)]))
    assert opener.device.downloaded_bytes == 8 * (8 + 4)


def test_engines_of_before_there_was_a_sampler_are_refused(exported, opener, monkeypatch):
    check = opener.check

    def older(info, directory):
        info = check(info, directory)
        return dataclasses.replace(info, profiles=tuple(p for p in info.profiles if p.engine != SAMPLER_ENGINE))

    monkeypatch.setattr(opener, "check", older)
    with pytest.raises(ArtifactError, match=r"sampler\.engine: expected .* found none; export the stage and build it"):
        TensorRtVerifier(exported[0], StageSettings(), opener)


class TestSampling:
    """Rows that tokens are drawn from are ranked on the device; whole ones come back where the ranks do not decide."""

    def test_ranks_come_back_with_the_small_outputs(self, verifier, opener):
        verifier.allocate(4, 128, ())
        segments = [Segment(0, 0, [5, 6, 7], 1, 0.5), Segment(1, 0, [8, 9], 1), Segment(2, 0, [1, 2], 1, 2.0)]
        output = verifier.step(StepBatch.pack(segments))
        size, count = verifier.artifact.vocab_size, output.ranked.ids.shape[1]
        assert count == min(MAX_RANKED, size) == output.ranked.vocab_size
        # Four rows, that many as they are.
        assert opener.device.downloaded_bytes == 4 * (8 + 4) + 4 * (count * (8 + 4) + 4)
        rows = np.asarray(output.logits).astype(np.float64)
        np.testing.assert_array_equal(output.ranked.logits, np.take_along_axis(rows, output.ranked.ids, axis=1))
        np.testing.assert_array_equal(output.ranked.logits, -np.sort(-rows, axis=1)[:, :count])
        sums = np.exp((rows - rows.max(axis=1, keepdims=True)) / np.array([[0.5], [0.5], [1], [2]])).sum(axis=1)
        np.testing.assert_allclose(output.ranked.exp_sum[[0, 1, 3]], sums[[0, 1, 3]], rtol=1e-6)

    def test_greedy_steps_and_silent_chunks_rank_nothing(self, verifier, opener):
        verifier.allocate(4, 128, ())
        assert verifier.step(StepBatch.pack([Segment(0, 0, [5, 6], 0)])).ranked is None
        assert verifier.step(StepBatch.pack([Segment(0, 2, [5, 6], 2, 1.0), Segment(1, 0, [1], 0)])).ranked is None
        assert opener.engines[SAMPLER_ENGINE].runs == 0

    def test_graphs_rank_the_step_that_is(self, verifier, opener):
        """Captured and launched behind the verifier's own, on other rows each time."""
        verifier.allocate(4, 128, ())
        for turn in range(6):
            batch = StepBatch.pack([Segment(0, turn, [turn], 0, 1.0), Segment(2, turn, [turn + 50], 0, 0.5)])
            output = verifier.step(batch)
            assert output.ranked.ids[:, 0].tolist() == output.argmax.tolist()
            assert output.ranked.logits[:, 0].tolist() == output.top_logit.tolist()
        assert opener.device.launches == 8, "two graphs, four times each"

    @pytest.mark.parametrize("ranked", [8, 384])
    def test_speculation_reads_few_rows(self, exported, golden_artifacts, tmp_path, monkeypatch, ranked):
        """Seeded answers are those of an engine that reads every row, where heads are all of a distribution."""
        export_golden_drafter(NAME, golden_artifacts[NAME], tmp_path / "d")
        driver = SpeculatingDriver(golden_artifacts[NAME], tmp_path / "d", prefill_chunk=48, max_slots=8)
        kinds = [{"top_k": 4}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.7}, {}]
        requests = [
            ids(*prompt(seed, 20), max_tokens=16, seed=seed, temperature=0.8, **kind)
            for seed, kind in enumerate(
                [*kinds, {"top_k": 4, "presence_penalty": 0.5}, {"top_k": 4, "log_probs": True}]
            )
        ]
        reads: list[int] = []
        as_array = DeviceRows.__array__

        def counted(rows, *arguments, **options):
            reads.append(rows.width)
            return as_array(rows, *arguments, **options)

        monkeypatch.setattr(DeviceRows, "__array__", counted)
        answers, read = [], []
        for heads in (False, True):
            opener = HostOpener(HostDevice())
            driver.stage = TensorRtVerifier(exported[0], StageSettings(), opener)
            driver.drafter = TensorRtDrafter(exported[1], exported[0], StageSettings(), opener)
            step = driver.stage.step

            def cut(batch, step=step, heads=heads):
                output = step(batch)
                if output.ranked is None:
                    return output
                few = output.ranked
                few = dataclasses.replace(few, ids=few.ids[:, :ranked], logits=few.logits[:, :ranked])
                return dataclasses.replace(output, ranked=few if heads else None)

            driver.stage.step = cut
            drafting = Drafting(driver.drafter, Calibration.identity(driver.drafter.artifact.block_size), CHEAP)
            driver.engine = Engine(driver.stage, None, driver.config, drafting, driver.records.append)
            for request in requests:
                reads.clear()
                answers.append(driver.run(request)[0].tokens())
                read.append(reads.count(driver.stage.artifact.vocab_size))
            assert opener.engines[SAMPLER_ENGINE].runs > 0
        rows, heads = read[: len(requests)], read[len(requests) :]
        plain = 3
        for place, (before, after) in enumerate(zip(answers[: len(requests)], answers[len(requests) :], strict=True)):
            if place != plain or ranked == 384:
                assert after == before, requests[place]
        assert min(rows) >= 16
        if ranked == 384:
            assert heads[:4] == [0] * 4
        else:
            assert heads[0] == heads[2] == 0 and max(heads[1], heads[plain]) > 0
        assert heads[4:] == rows[4:], "penalties and log-probabilities take the rows"


def test_more_slots_than_the_engine_has(verifier):
    with pytest.raises(ConfigError, match=r"max_slots: expected at most 10, .* got 11"):
        verifier.allocate(11, 128, ())


def test_a_step_that_no_profile_holds(verifier):
    verifier.allocate(2, 256, ())
    with pytest.raises(InternalError, match=r"expected a profile for B=65.*prefill takes Q from 1 to 64"):
        verifier.step(StepBatch.pack([Segment(0, 0, [1] * 65, 65)]))


def test_rows_that_are_not_finite_stay_with_their_request(verifier, opener):
    artifact = verifier.artifact
    table = opener.device.array(
        verifier._shared[SHARED_EMBEDDING].address, (artifact.vocab_size, artifact.hidden_size), np.float16
    )
    table[7] = np.nan
    verifier.allocate(2, 128, ())
    features = np.asarray(verifier.step(StepBatch.pack([Segment(0, 0, [7] * 5, 0), Segment(1, 0, [1, 2], 0)])).features)
    assert np.isnan(features[:5]).all() and np.isfinite(features[5:]).all()
    # What was written behind the second one's rows is seen in the next step, under the mask.
    batch = StepBatch.pack([Segment(0, 5, [7], 0), Segment(1, 2, [4], 0)])
    assert np.isfinite(np.asarray(verifier.step(batch).features)[1]).all()


def test_scoring_in_steps_that_the_engine_holds(exported, reference):
    stage = TensorRtVerifier(exported[0], StageSettings(), HostOpener(HostDevice(), slots=3, prefill_chunk=16))
    tokens = np.random.default_rng(4).integers(0, 300, 50).tolist()
    found, expected = score(stage, tokens, True), score(reference, tokens, True)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=0, atol=2 * TOLERANCE)


def test_the_cost_model_is_measured_with_all_slots_of_the_engine(exported):
    opener = HostOpener(HostDevice(), slots=2)
    verifier = TensorRtVerifier(exported[0], StageSettings(), opener)
    drafter = TensorRtDrafter(exported[1], exported[0], StageSettings(), opener)
    plan = ProfilePlan(max_slots=2, capacities=(128,), repetitions=1)
    model = measure(verifier, drafter, plan, artifacts.silent)
    assert {curve.num_requests for curve in model.verify} == {curve.num_requests for curve in model.draft} == {1, 2}


def test_engines_that_are_too_small_are_refused_at_the_load(exported, verifier, opener, monkeypatch):
    drafter = TensorRtDrafter(exported[1], exported[0], StageSettings(), opener)
    check_engines(verifier.artifact, drafter.artifact, 10, 64)
    wide = dataclasses.replace(drafter.artifact, block_size=8)
    with pytest.raises(ConfigError, match=r"10 requests with 8 drafts each .*B=90.*Q=9.*block_size=8"):
        check_engines(verifier.artifact, wide, 10, 64)
    few = [dataclasses.replace(one, ranges=one.ranges | {"D": (1, 1, 9)}) for one in drafter.artifact.engine.profiles
           if one.engine == DRAFT_ENGINE]  # fmt: skip
    narrow = dataclasses.replace(drafter.artifact.engine, profiles=tuple(few))
    with pytest.raises(ConfigError, match=r"max_slots: .*draft\.engine for blocks of 10 requests"):
        check_engines(verifier.artifact, dataclasses.replace(drafter.artifact, engine=narrow), 10, 64)
    monkeypatch.setattr(runner, "open_verifier", lambda *_: verifier)
    monkeypatch.setattr(runner, "open_drafter", lambda *_: drafter)
    for pair in ({}, {"drafter": exported[1]}):
        for sizes, message in (
            (
                {"max_slots": 200, "prefill_chunk": 64},
                "max_slots: expected a profile of verifier.engine for 200 requests",
            ),
            ({"max_slots": 8, "prefill_chunk": 65}, "prefill_chunk: .* Q=64; lower prefill_chunk, or build .*chunk=65"),
        ):
            with pytest.raises(ConfigError, match=message):
                runner.EngineRunner.open(EngineConfig(verifier=exported[0], **sizes, **pair))


@pytest.mark.parametrize("dtype", COMPUTE_DTYPES)
def test_cache_rows_count_as_the_engine_stores_them(verifier, dtype):
    item = ITEM_BYTES[COMPUTE_DTYPES[dtype]]
    artifact = dataclasses.replace(verifier.artifact, dtype=dtype)
    assert artifact.cache_bytes_per_token == sum(2 * heads * size * item for heads, size in artifact.cache_shapes)


def test_closing_gives_everything_back(exported, opener):
    verifier = TensorRtVerifier(exported[0], StageSettings(), opener)
    drafter = TensorRtDrafter(exported[1], exported[0], StageSettings(), opener)
    allocate((verifier, drafter), 2, 128, ())
    for _ in range(3):
        verifier.step(StepBatch.pack([Segment(0, 0, [1, 2], 0)]))
    verifier.close()
    drafter.close()
    assert not opener.device.blocks and not opener.device.graphs


class TestDrafter:
    """Against the numbers of the reference implementation, with features that stay on the device."""

    @pytest.fixture
    def drafter(self, exported, opener, verifier):
        return TensorRtDrafter(exported[1], exported[0], StageSettings(), opener)

    def test_golden_rounds_behind_the_verifiers_features(self, drafter, verifier, opener):
        golden = artifacts.golden_arrays(NAME)
        text = np.concatenate([golden["prompt"], golden["greedy"]]).tolist()
        allocate((verifier, drafter), 4, 128, ())
        matched = total = 0
        for round_ in golden_rounds(NAME):
            piece = text[round_.first : round_.start]
            features = verifier.step(StepBatch.pack([Segment(2, round_.first, piece, len(piece))])).features
            halves = joined([features[:3].copy(), features[3:].copy()])
            slots = np.full(len(piece), 2)
            context = ContextRows(halves, np.arange(round_.first, round_.start), slots)
            batch = draft_batch(drafter.artifact, context, [round_.anchor], [2], [round_.start])
            output = drafter.draft(batch)
            np.testing.assert_allclose(output.confidence_logits[0, :1], round_.confidence_logits[:1], atol=0.05)
            matched += int((output.tokens[0] == round_.draft_tokens).sum())
            total += output.tokens.size
        assert matched > 0.9 * total

    def test_context_that_is_not_finite_stays_with_its_request(self, drafter):
        width = drafter.artifact.hidden_size * len(drafter.artifact.target_layer_ids)
        features = np.random.default_rng(3).normal(size=(4, width)).astype(np.float32)
        features[0] = np.nan
        context = ContextRows(features, np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
        drafter.allocate(2, 128, ())
        drafter.commit_context(context)
        output = drafter.draft(draft_batch(drafter.artifact, context, [5, 6], [0, 1], [1, 3]))
        assert np.isfinite(output.confidence_logits[1]).all() and np.isfinite(output.probabilities[1]).all()
        after = ContextRows(features[:0], np.zeros(0, np.int64), np.zeros(0, np.int64))
        output = drafter.draft(draft_batch(drafter.artifact, after, [6], [1], [3]))
        assert np.isfinite(output.confidence_logits).all()

    def test_context_in_pieces(self, drafter):
        width = drafter.artifact.hidden_size * len(drafter.artifact.target_layer_ids)
        features = np.random.default_rng(2).normal(size=(200, width)).astype(np.float32)
        outputs = []
        for cuts in ((0, 200), (0, 150, 200), (0, 30, 60, 199, 200)):
            drafter.allocate(3, 256, ())
            for first, end in itertools.pairwise(cuts[:-1]):
                drafter.commit_context(context_rows(features, first, end, 1))
            context = context_rows(features, cuts[-2], cuts[-1], 1)
            outputs.append(drafter.draft(draft_batch(drafter.artifact, context, [5], [1], [200])))
        for output in outputs[1:]:
            np.testing.assert_allclose(output.confidence_logits, outputs[0].confidence_logits, atol=0.02)


def test_greedy_speculation_is_greedy_decoding(exported, opener, golden_artifacts, tmp_path):
    """Through the whole engine: drafts change the number of steps, and nothing else."""
    export_golden_drafter(NAME, golden_artifacts[NAME], tmp_path / "d")
    driver = SpeculatingDriver(golden_artifacts[NAME], tmp_path / "d", prefill_chunk=48, max_slots=8)
    driver.stage = TensorRtVerifier(exported[0], StageSettings(), opener)
    driver.drafter = TensorRtDrafter(exported[1], exported[0], StageSettings(), opener)
    requests = [ids(*prompt(seed, 20 + 9 * seed), max_tokens=24) for seed in range(4)]
    settings = driver.config
    driver.engine = Engine(driver.stage, None, settings)
    plain = [sink.tokens() for sink in driver.run(*requests)]
    plain_runs = opener.engines[VERIFIER_ENGINE].runs
    drafting = Drafting(driver.drafter, Calibration.identity(driver.drafter.artifact.block_size), CHEAP)
    driver.engine = Engine(driver.stage, None, settings, drafting, driver.records.append)
    assert [sink.tokens() for sink in driver.run(*requests)] == plain
    assert opener.engines[DRAFT_ENGINE].runs > 0 and sum(record.accepted for record in driver.records) > 0
    assert opener.engines[VERIFIER_ENGINE].runs - plain_runs < plain_runs
