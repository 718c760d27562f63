"""The cost model: what it predicts at, between and beyond measured points, its text form, and the online check."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.cost_tracker import CostTracker
from dspark_backend.errors import ArtifactError
from dspark_backend.scheduling import Causal, DraftRound, Lagged

Law = Callable[[float, float, float], float]


def planar(tokens: float, requests: float, capacity: float) -> float:
    """Weights, a token, a request, attention: linear in each, so that prediction must be exact."""
    return 8e-3 + 5e-4 * tokens + 3e-4 * requests + 1e-7 * requests * capacity


def measured(law: Law, levels: dict[int, tuple[int, ...]], each: tuple[int, ...] = (1, 2, 3, 5, 8)) -> CostModel:
    """A model whose points follow a law; ``levels`` are the requests at each capacity."""
    verify = [
        StepCurve(requests, capacity, each, tuple(law(requests * q, requests, capacity) for q in each))
        for capacity, counts in levels.items()
        for requests in counts
    ]
    draft = [
        StepCurve(requests, capacity, (1,), (law(0, requests, capacity) / 4,))
        for capacity, counts in levels.items()
        for requests in counts
    ]
    return CostModel(tuple(verify), tuple(draft))


FULL = {128: (1, 2, 4, 8, 16), 512: (1, 2, 4, 8, 16), 2048: (1, 2, 4, 8, 16)}
RAGGED = {128: (1, 2, 4, 8, 16), 512: (1, 2, 4, 8), 2048: (1, 2)}


@pytest.mark.parametrize("levels", [FULL, RAGGED], ids=["full", "ragged"])
@pytest.mark.parametrize("requests", [1, 3, 5, 16, 24])
@pytest.mark.parametrize("capacity", [128, 200, 512, 1024, 2048, 4096])
def test_a_linear_law_is_recovered_between_and_beyond_measured_points(
    levels: dict[int, tuple[int, ...]], requests: int, capacity: int
) -> None:
    model = measured(planar, levels)
    counts = requests + np.arange(12 * requests)
    expected = [planar(count, requests, capacity) for count in counts]
    np.testing.assert_allclose(model.verify_seconds(requests, counts, capacity), expected, rtol=1e-12)
    assert model.draft_seconds(requests, capacity, 1) == pytest.approx(planar(0, requests, capacity) / 4, rel=1e-12)


def test_measured_points_and_cliffs_are_kept() -> None:
    curve = StepCurve(4, 128, (1, 2, 3, 4), (0.01, 0.011, 0.05, 0.051))
    model = CostModel((StepCurve(1, 128, (1, 2), (0.005, 0.006)), curve, StepCurve(8, 128, (1,), (0.1,))))
    np.testing.assert_array_equal(model.verify_seconds(4, np.array([4, 8, 12, 16]), 128), curve.seconds)
    np.testing.assert_allclose(model.verify_seconds(4, np.array([6, 10, 11]), 128), [0.0105, 0.0305, 0.04025])


def test_below_the_smallest_capacity_and_request_count_the_first_curve_holds() -> None:
    model = measured(planar, {512: (2, 4), 2048: (2, 4)})
    counts = np.array([2, 4])
    np.testing.assert_array_equal(model.verify_seconds(2, counts, 10), model.verify_seconds(2, counts, 512))
    np.testing.assert_array_equal(model.verify_seconds(1, counts // 2, 512), model.verify_seconds(2, counts, 512))


def test_noise_that_makes_the_last_point_cheaper_does_not_extrapolate_downwards() -> None:
    falling = (0.02, 0.01)
    model = CostModel(
        (
            StepCurve(1, 128, (1, 2), (0.04, 0.03)),
            StepCurve(2, 128, (1, 2), falling),
            StepCurve(1, 512, (1, 2), (0.004, 0.003)),
            StepCurve(2, 512, (1, 2), (0.002, 0.001)),
        )
    )
    np.testing.assert_array_equal(model.verify_seconds(2, np.array([4, 400]), 128), [0.01, 0.01])
    np.testing.assert_array_equal(model.verify_seconds(100, np.array([100]), 128), [0.02])
    np.testing.assert_array_equal(model.verify_seconds(2, np.array([2]), 100_000), [0.002])


def test_a_single_curve_is_read_at_equal_tokens() -> None:
    model = CostModel((StepCurve(1, 128, (1, 2, 4), (0.01, 0.02, 0.04)),))
    np.testing.assert_allclose(model.verify_seconds(4, np.array([4, 8]), 128), [0.04, 0.08])


times = st.floats(1e-6, 1e3)


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 20), st.sampled_from([128, 256, 2048])),
        st.lists(times, min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 200),
    st.integers(1, 5000),
)
def test_predictions_are_positive_and_survive_json_to_the_last_bit(
    points: dict[tuple[int, int], list[float]], requests: int, capacity: int
) -> None:
    curves = tuple(
        StepCurve(count, rows, tuple(range(1, len(seconds) + 1)), tuple(seconds))
        for (count, rows), seconds in points.items()
    )
    single = tuple(StepCurve(c.num_requests, c.capacity, (1,), c.seconds[:1]) for c in curves)
    uneven = tuple(StepCurve(c.num_requests, c.capacity, (5,), c.seconds[-1:]) for c in curves if c.num_requests > 1)
    model = CostModel(curves, single, uneven)
    counts = requests + np.arange(41)
    seconds = model.verify_seconds(requests, counts, capacity)
    assert seconds.shape == (41,)
    assert np.isfinite(seconds).all() and (seconds > 0).all()
    assert model.draft_seconds(requests, capacity, 3) > 0
    wide = model.verify_seconds(requests, counts, capacity, widest=5)
    assert np.isfinite(wide).all() and (wide >= seconds).all()
    again = CostModel.from_json(model.to_json())
    assert again == model
    np.testing.assert_array_equal(again.verify_seconds(requests, counts, capacity), seconds)


def test_without_a_drafter_drafting_takes_no_time() -> None:
    assert CostModel(measured(planar, FULL).verify).draft_seconds(8, 512, 1) == 0.0


@pytest.mark.parametrize(("requests", "tokens"), [(0, 1), (3, 2)])
def test_a_step_has_a_token_for_each_request(requests: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="token or more for each"):
        measured(planar, FULL).verify_seconds(requests, np.array([tokens]), 128)


def test_a_cliff_stops_causal_and_not_lagged() -> None:
    # A step that only three drafts a request make worth while: two cost as much as four.
    model = CostModel((StepCurve(1, 128, (1, 2, 3, 4, 5), (0.010, 0.0195, 0.0196, 0.0197, 0.0198)),))
    survival = np.full((1, 4), 0.9)
    draft_round = DraftRound(survival, survival, np.array([4]), model.verify_seconds(1, 1 + np.arange(5), 128), 1.0)
    assert Causal().depths(draft_round).tolist() == [0]
    assert Lagged().depths(draft_round).tolist() == [4]


def _changed(**changes: object) -> str:
    raw = json.loads(CostModel((StepCurve(1, 128, (1, 2), (0.1, 0.2)),)).to_json())
    raw["verify"][0] |= changes
    return json.dumps(raw)


def _uneven(**changes: object) -> str:
    steps = tuple(StepCurve(count, 128, (1, 2), (0.1, 0.2)) for count in (1, 4))
    raw = json.loads(CostModel(steps, uneven=(StepCurve(4, 128, (2,), (0.15,)),)).to_json())
    raw["uneven"][0] |= changes
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object"),
        ('{"format_version": 3, "verify": []}', "expected an object"),
        ('{"format_version": 7, "verify": [], "draft": [], "uneven": []}', "format_version 3, got 7"),
        ('{"format_version": 3, "verify": [], "draft": [], "uneven": []}', "at least one verify curve"),
        ('{"format_version": 3, "verify": 3, "draft": [], "uneven": []}', "list of curves"),
        ('{"format_version": 3, "verify": [{}], "draft": [], "uneven": []}', "expected curves with"),
        (_uneven(num_requests=1), "two requests or more"),
        (_uneven(tokens_each=[1]), "two requests or more"),
        (_uneven(tokens_each=[2, 5], seconds=[0.1, 0.2]), "two requests or more"),
        (_changed(seconds=[0.1]), "a time for each"),
        (_changed(seconds=[0.1, 0.0]), "positive seconds"),
        (_changed(seconds=[0.1, math.inf]), "positive seconds"),
        (_changed(seconds=[0.1, math.nan]), "positive seconds"),
        (_changed(seconds=[0.1, "fast"]), "positive seconds"),
        (_changed(seconds="12"), "expected lists"),
        (_changed(tokens_each=[2, 1]), "ascending"),
        (_changed(tokens_each=[1, 1]), "ascending"),
        (_changed(tokens_each=[0, 1]), "at least 1"),
        (_changed(num_requests=True), "whole numbers"),
        (_changed(capacity=1.5), "whole numbers"),
        (_changed(tokens_each=[], seconds=[]), "at least one point"),
    ],
)
def test_a_damaged_model_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        CostModel.from_json(text)


def test_two_curves_of_the_same_place_are_refused() -> None:
    curve = StepCurve(1, 128, (1,), (0.1,))
    with pytest.raises(ArtifactError, match="one draft curve a"):
        CostModel((curve,), (curve, curve))


def test_the_tracker_finds_a_constant_factor_and_its_error() -> None:
    tracker = CostTracker()
    assert tracker.scale == 1.0
    for index in range(300):
        tracker.update(0.01 * (1 + index % 7), 0.02 * (1 + index % 7))
    assert tracker.scale == pytest.approx(2.0)
    assert tracker.mean_relative_error == pytest.approx(0.5)
    assert tracker.is_stale(1.5)
    assert not tracker.is_stale(2.5)


@pytest.mark.parametrize("factor", [0.4, 1.8])
def test_the_tracker_follows_a_change_either_way(factor: float) -> None:
    tracker = CostTracker()
    for _ in range(1000):
        tracker.update(0.01, 0.01)
    assert not tracker.is_stale()
    assert tracker.mean_relative_error == 0.0
    for _ in range(400):
        tracker.update(0.01, 0.01 * factor)
    assert tracker.scale == pytest.approx(factor, rel=0.01)
    assert tracker.is_stale()


def test_a_few_updates_or_one_pause_do_not_make_the_table_stale() -> None:
    tracker = CostTracker()
    for _ in range(100):
        tracker.update(0.01, 0.05)
    assert not tracker.is_stale()
    steady = CostTracker()
    for _ in range(1000):
        steady.update(0.01, 0.01)
    steady.update(0.01, 100.0)
    assert steady.scale < 1.1
    assert not steady.is_stale()


def test_times_that_say_nothing_are_ignored() -> None:
    tracker = CostTracker()
    for predicted, actual in [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf), (-1.0, 1.0)]:
        tracker.update(predicted, actual)
    assert tracker == CostTracker()


def test_a_memory_that_never_forgets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        CostTracker(memory=1.0)
