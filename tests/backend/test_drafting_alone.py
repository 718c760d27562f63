"""A block drafted by the drafter alone, against the reference's rounds and against a batch made by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from artifacts import golden_arrays
from drafters import context_rows, draft_batch, export_golden_drafter, golden_rounds

from dspark_backend.calibration import sigmoid
from dspark_backend.drafting_alone import CHUNK, DraftQuery, draft_alone, parse_query
from dspark_backend.errors import InvalidRequest
from dspark_backend.request import SamplingParams
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter

NAME = "qwen3_vanilla"


@pytest.fixture(scope="module")
def stage(golden_artifacts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "drafter"
    export_golden_drafter(NAME, golden_artifacts[NAME], folder)
    made = OnnxRuntimeDrafter(folder, golden_artifacts[NAME], threads=1)
    yield made
    made.close()


def random_features(stage, rows: int) -> np.ndarray:
    width = stage.artifact.hidden_size * len(stage.artifact.target_layer_ids)
    return np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)


def test_every_golden_round(stage):
    features = golden_arrays(NAME)["target_features"]
    for round_ in golden_rounds(NAME):
        drawn = draft_alone(stage, DraftQuery(features[: round_.start], round_.anchor))
        assert drawn.tokens.tolist() == round_.draft_tokens.tolist()
        expected = 1 / (1 + np.exp(-round_.confidence_logits.astype(np.float64)))
        np.testing.assert_allclose(drawn.confidence, expected, rtol=0, atol=1e-4)
        # Greedy: all probability on the first candidate.
        assert drawn.candidates[:, 0].tolist() == drawn.tokens.tolist()
        assert drawn.probabilities.tolist() == [[1.0] + [0.0] * (drawn.candidates.shape[1] - 1)] * len(drawn.tokens)


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 511])
def test_chunks_change_no_bit(stage, rows):
    features = random_features(stage, rows)
    drawn = draft_alone(stage, DraftQuery(features, 7))
    stage.allocate(1, 1024, ())
    whole = stage.draft(draft_batch(stage.artifact, context_rows(features, 0, rows, 0), [7], [0], [rows]))
    assert drawn.tokens.tolist() == whole.tokens[0].tolist()
    assert drawn.confidence.tobytes() == sigmoid(whole.confidence_logits[0]).tobytes()
    assert drawn.candidates.tolist() == whole.candidates[0].tolist()


def test_queries_do_not_leak_into_each_other(stage):
    query = DraftQuery(random_features(stage, 20), 3)
    first = draft_alone(stage, query)
    draft_alone(stage, DraftQuery(random_features(stage, 400), 9))
    again = draft_alone(stage, query)
    assert again.confidence.tobytes() == first.confidence.tobytes()
    assert again.tokens.tolist() == first.tokens.tolist()


def test_a_seed_draws_the_same_block_and_others_other_ones(stage):
    features = random_features(stage, 20)

    def draw(seed: int | None) -> tuple[int, ...]:
        return tuple(draft_alone(stage, DraftQuery(features, 3, SamplingParams(temperature=2.0, seed=seed))).tokens)

    assert draw(11) == draw(11)
    assert len({draw(seed) for seed in range(20)}) > 10
    assert len({draw(None) for _ in range(20)}) > 10


def test_the_first_draft_follows_the_probabilities_that_are_reported(stage):
    features = random_features(stage, 20)
    counts: dict[int, int] = {}
    for seed in range(2000):
        drawn = draft_alone(stage, DraftQuery(features, 3, SamplingParams(temperature=1.0, top_k=4, seed=seed)))
        counts[int(drawn.tokens[0])] = counts.get(int(drawn.tokens[0]), 0) + 1
    candidates, probabilities = drawn.candidates[0], drawn.probabilities[0]
    assert (probabilities > 0).sum() == 4 and probabilities.sum() == pytest.approx(1.0)
    for token, probability in zip(candidates[:4].tolist(), probabilities[:4].tolist(), strict=True):
        spread = np.sqrt(2000 * probability * (1 - probability))
        assert abs(counts.get(token, 0) - 2000 * probability) < 5 * spread + 1


def test_the_least_temperature_there_is_drafts_greedily(stage):
    features = random_features(stage, 20)
    greedy = draft_alone(stage, DraftQuery(features, 3))
    least = draft_alone(stage, DraftQuery(features, 3, SamplingParams(temperature=float(np.float32(1e-45)), seed=1)))
    assert least.tokens.tolist() == greedy.tokens.tolist()
    assert least.probabilities.tolist() == greedy.probabilities.tolist()


def test_top_p_and_top_k_cut_the_candidates(stage):
    features = random_features(stage, 20)

    def support(**options) -> int:
        drawn = draft_alone(stage, DraftQuery(features, 3, SamplingParams(temperature=1.5, seed=1, **options)))
        return int((drawn.probabilities[0] > 0).sum())

    most = stage.artifact.num_candidates
    assert support() == support(top_k=10**6) == support(top_k=-1) == most
    assert support(top_k=3) == 3
    assert 1 <= support(top_p=0.3) < most


def test_tensors_become_a_query():
    features = np.ones((2, 6), np.float32)[:, ::2]
    query = parse_query(
        {
            "features": features,
            "anchor": np.array([5], np.int32),
            "temperature": np.array([0.5], np.float32),
            "top_k": np.array([7], np.int32),
            "top_p": np.array([0.25], np.float32),
            "seed": np.array([2**64 - 1], np.uint64),
        }
    )
    assert query.features.flags.c_contiguous and query.features.tolist() == features.tolist()
    assert query.anchor == 5
    assert query.sampling == SamplingParams(temperature=0.5, top_k=7, top_p=0.25, seed=2**64 - 1)
    assert parse_query({"features": features, "anchor": np.array([5], np.int32)}).sampling.greedy


GOOD = {"features": np.zeros((2, 4), np.float32), "anchor": np.zeros(1, np.int32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": None}, "features: expected a tensor, got none"),
        ({"anchor": None}, "anchor: expected a tensor, got none"),
        ({"features": np.zeros(4, np.float32)}, "features: expected rows [T, F], got shape [4]"),
        ({"anchor": np.zeros(2, np.int32)}, "anchor: expected one value (shape [1]), got shape [2]"),
        ({"temperature": np.zeros(0, np.float32)}, "temperature: expected one value (shape [1]), got shape [0]"),
        ({"temperature": np.array([-1.0], np.float32)}, "temperature: expected 0 (greedy) to 100, got -1.0"),
        ({"top_p": np.array([np.nan], np.float32)}, "top_p: expected a finite number, got nan"),
    ],
)
def test_tensors_that_spell_no_query(changes, message):
    arrays = {name: array for name, array in (GOOD | changes).items() if array is not None}
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}$"):
        parse_query(arrays)


@pytest.mark.parametrize(
    ("rows", "width", "anchor", "message"),
    [
        (0, None, 1, "features: expected 1 to 511 rows, got 0"),
        (512, None, 1, "features: expected 1 to 511 rows, got 512"),
        (3, 5, 1, "features: expected rows of "),
        (3, None, -1, "anchor: expected an id from 0 to 383, got -1"),
        (3, None, 384, "anchor: expected an id from 0 to 383, got 384"),
    ],
)
def test_queries_that_do_not_fit_the_drafter(stage, rows, width, anchor, message):
    features = random_features(stage, rows)
    features = features if width is None else features[:, :width]
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}"):
        draft_alone(stage, DraftQuery(features, anchor))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers(stage, value):
    features = random_features(stage, 3)
    features[1, 1] = value
    with pytest.raises(InvalidRequest, match=r"^features: expected finite numbers"):
        draft_alone(stage, DraftQuery(features, 1))
