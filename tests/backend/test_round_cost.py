"""Predictions of whole rounds: the model's curves, kept, and scaled by what was seen."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.cost_cache import CostCache
from dspark_backend.round_cost import RoundCost

BLOCK = 3
MODEL = CostModel(
    verify=(
        StepCurve(1, 128, (1, 2, 4), (0.010, 0.011, 0.015)),
        StepCurve(8, 128, (1, 2, 4), (0.030, 0.040, 0.070)),
        StepCurve(1, 512, (1, 4), (0.012, 0.020)),
    ),
    draft=(StepCurve(1, 128, (1, 3), (0.001, 0.002)), StepCurve(8, 128, (1, 3), (0.005, 0.009))),
)


@pytest.mark.parametrize("capacity", [128, 300, 512])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_predictions_are_the_models(count, capacity):
    cost = RoundCost(MODEL, BLOCK)
    most = BLOCK * count
    verify = MODEL.verify_seconds(count, count + np.arange(most + 1), capacity)
    for _ in range(2):
        np.testing.assert_array_equal(cost.step_seconds(count, most, capacity, 0), verify)
        np.testing.assert_array_equal(cost.step_seconds(count, 2, capacity, 0), verify[:3])
        for width in (1, 2, 3):
            assert cost.draft_seconds(count, capacity, width) == MODEL.draft_seconds(count, capacity, width)
        assert cost.verify_seconds(count, most, capacity, 0) == verify[-1]


def test_room_for_the_deepest_is_paid_by_all():
    uneven = (StepCurve(8, 128, (4,), (0.0413,)),)
    cost = RoundCost(CostModel(MODEL.verify, MODEL.draft, uneven), BLOCK)
    # 11 tokens evenly are 1.375 each: 33.75 ms; the rest is for the 2.625 places that one request needs beyond that.
    place = (0.0413 - 0.03375) / 2.625
    even = MODEL.verify_seconds(8, np.array([8, 10, 12]), 128)
    got = [cost.verify_seconds(8, drafts, 128, 2) for drafts in (0, 2, 4)]
    np.testing.assert_allclose(got, even + place * np.array([2.0, 1.75, 1.5]), rtol=1e-9)
    assert cost.verify_seconds(8, 3, 128, 3) == pytest.approx(0.0413)


def test_whether_depth_costs():
    whole = tuple(StepCurve(count, 128, (3,), (0.002 * count,)) for count in (1, 8))
    uneven = (StepCurve(8, 128, (4,), (0.0413,)),)
    # By its places in the step, or by its slots in the drafter.
    assert RoundCost(CostModel(MODEL.verify, whole, uneven), BLOCK).depth_costs(8, 128)
    assert RoundCost(MODEL, BLOCK).depth_costs(8, 128)
    assert not RoundCost(CostModel(MODEL.verify, whole), BLOCK).depth_costs(8, 128)
    assert not RoundCost(CostModel(MODEL.verify, whole, uneven), BLOCK).depth_costs(1, 128)


def test_what_was_returned_is_the_callers():
    cost = RoundCost(MODEL, BLOCK)
    before = cost.step_seconds(2, 4, 128, 2)
    expected = before.copy()
    before[:] = 0.0
    np.testing.assert_array_equal(cost.step_seconds(2, 4, 128, 2), expected)


def test_each_stage_is_scaled_by_its_own_steps():
    cost = RoundCost(MODEL, BLOCK)
    verify, draft = cost.verify_seconds(1, 0, 128, 0), MODEL.draft_seconds(1, 128, 2)
    for _ in range(300):
        cost.observe_verify(1, 0, 128, 0, 2 * verify)
        cost.observe_draft(1, 128, 2, 5 * draft)
    assert cost.step_seconds(1, 0, 128, 0)[0] == pytest.approx(2 * verify)
    assert cost.draft_seconds(1, 128, 2) == pytest.approx(5 * draft)
    assert cost.verify_seconds(1, 0, 128, 0) == verify
    assert cost.mean_relative_error == pytest.approx(0.5)


def test_many_combinations_are_not_kept_for_ever():
    cost = RoundCost(MODEL, BLOCK)
    for count in range(1, 700):
        expected = MODEL.verify_seconds(count, np.array([count]), 128)[0]
        assert cost.step_seconds(count, 0, 128, 0)[0] == pytest.approx(expected)
        assert cost.draft_seconds(count, 128, 3) == MODEL.draft_seconds(count, 128, 3)
    assert len(cost._curves) <= RoundCost._MOST_KEPT and len(cost._draft_times) <= RoundCost._MOST_KEPT


def test_a_model_that_proves_wrong_is_forgotten(tmp_path, caplog):
    cache = CostCache(tmp_path, "key")
    cache.store(MODEL)
    cost = RoundCost(MODEL, BLOCK, cache)
    for _ in range(400):
        cost.observe_verify(1, 0, 128, 0, 0.03)
    assert cache.load() is None
    assert caplog.text.count("next load measures again") == 1


def step(cost: RoundCost, drafts: int, seconds: float, capacity: int = 128) -> None:
    """Of 8 requests, of which one has two drafts where any has."""
    depth = 2 if drafts else 0
    cost.observe_verify(8, drafts, capacity, depth, seconds)


@pytest.mark.parametrize("pace", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5])
def test_what_drafts_add_is_learned_beside_the_machines_pace(factor, pace):
    cost = RoundCost(MODEL, BLOCK)
    plain, wide = MODEL.verify_seconds(8, np.array([8, 24]), 128)
    rng = np.random.default_rng(0)
    for _ in range(60):
        for _ in range(4):
            step(cost, 0, pace * plain * rng.uniform(0.95, 1.05))
        step(cost, 16, pace * (plain + factor * (wide - plain)) * rng.uniform(0.95, 1.05))
    learned = cost.step_seconds(8, 16, 128, 2)
    assert learned[0] == pytest.approx(pace * plain, rel=0.1)
    assert learned[16] == pytest.approx(pace * (plain + factor * (wide - plain)), rel=0.1)
    # A batch of another size has its own.
    one = MODEL.verify_seconds(1, np.array([1, 3]), 128)
    np.testing.assert_allclose(
        cost.step_seconds(1, 2, 128, 2)[[0, 2]] / cost.step_seconds(1, 0, 128, 2)[0], one / one[0]
    )


def test_a_pause_of_the_machine_teaches_nothing_about_drafts():
    cost = RoundCost(MODEL, BLOCK)
    plain, wide = MODEL.verify_seconds(8, np.array([8, 24]), 128)
    for index in range(40):
        step(cost, 0, plain * (10 if index % 7 == 3 else 1))
        step(cost, 16, wide * (10 if index % 5 == 4 else 1))
    learned = cost.step_seconds(8, 16, 128, 2)
    assert learned[16] / learned[0] == pytest.approx(wide / plain, rel=0.02)


@pytest.mark.parametrize("before", [0.2, 5.0])
def test_another_pace_of_the_machine_is_found_while_few_draft(before):
    """Steps without drafts that follow one another never wait until the last pace is too old to be believed."""
    cost = RoundCost(MODEL, BLOCK)
    plain, wide = MODEL.verify_seconds(8, np.array([8, 24]), 128)
    step(cost, 0, before * plain)
    for _ in range(60):
        step(cost, 0, plain)
        step(cost, 0, plain)
        step(cost, 16, plain + 1.5 * (wide - plain))
    learned = cost.step_seconds(8, 16, 128, 2)
    assert learned[16] / learned[0] == pytest.approx((plain + 1.5 * (wide - plain)) / plain, rel=0.1)


def test_a_step_without_drafts_is_wanted_when_it_is_long_ago():
    cost = RoundCost(MODEL, BLOCK)
    plain, wide = MODEL.verify_seconds(8, np.array([8, 24]), 128)
    for _ in range(RoundCost._PLAIN_EVERY):
        assert not cost.wants_plain(8)
        step(cost, 16, 2 * wide)
    assert cost.wants_plain(8) and not cost.wants_plain(1)
    # Nothing told what of it was drafts: all steps are thought to be slow.
    assert cost.step_seconds(8, 0, 128, 0)[0] == pytest.approx(2 * plain)
    step(cost, 0, plain)
    assert not cost.wants_plain(8)
    step(cost, 16, 1.5 * wide)
    learned = cost.step_seconds(8, 16, 128, 2)
    assert learned[16] / learned[0] > wide / plain
