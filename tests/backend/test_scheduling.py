"""Depth policies: optimal where they claim it, within the limits, and blind to what they must not see."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markov_speculation import Retrospective

from dspark_backend import scheduling
from dspark_backend.scheduling import (
    POLICY_FORMS,
    Causal,
    DepthPolicy,
    DraftRound,
    Fixed,
    Lagged,
    Off,
    Threshold,
    parse_policy,
)

EVERY = [Off(), Fixed(0), Fixed(2), Fixed(99), Threshold(0.0), Threshold(0.4), Causal(), Lagged()]
DYNAMIC = [Threshold(0.4), Causal(), Lagged()]
# A few values make ties common; fractions of many digits make sums and products round.
confidences = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0))
times = st.one_of(st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.01, 100.0))


def curve(draw_value, count: int, block: int) -> np.ndarray:
    flat = draw_value(st.lists(confidences, min_size=count * block, max_size=count * block))
    return np.cumprod(np.reshape(flat, (count, block)), axis=1)


@st.composite
def rounds(draw_value, max_requests: int = 5, max_block: int = 4, convex: bool = False) -> DraftRound:
    count, block = draw_value(st.integers(1, max_requests)), draw_value(st.integers(1, max_block))
    size = count * block + 1
    if convex:
        slopes = sorted(draw_value(st.lists(st.floats(0.0, 3.0), min_size=size - 1, max_size=size - 1)))
        seconds = draw_value(st.floats(0.1, 10.0)) + np.concatenate([[0.0], np.cumsum(slopes)])
    else:
        seconds = np.array(draw_value(st.lists(times, min_size=size, max_size=size)))
    return DraftRound(
        survival=curve(draw_value, count, block),
        lagged_survival=curve(draw_value, count, block),
        limits=np.array(draw_value(st.lists(st.integers(0, block + 2), min_size=count, max_size=count))),
        seconds=seconds,
        base_tokens=count + draw_value(st.sampled_from([0.0, 1.0, 2.75])),
    )


def make_round(survival, seconds, lagged=None, limits=None, base=None) -> DraftRound:
    survival = np.array(survival, dtype=np.float64)
    count, block = survival.shape
    return DraftRound(
        survival=survival,
        lagged_survival=survival if lagged is None else np.array(lagged, dtype=np.float64),
        limits=np.full(count, block) if limits is None else np.array(limits),
        seconds=np.array(seconds, dtype=np.float64),
        base_tokens=count if base is None else base,
    )


def rate(draft_round: DraftRound, depths, survival=None) -> float:
    """Expected tokens a second at given depths."""
    survival = draft_round.survival if survival is None else survival
    tokens = sum(row[:depth].sum() for row, depth in zip(survival, depths, strict=True))
    return float((draft_round.base_tokens + tokens) / draft_round.seconds[int(sum(depths))])


def brute_force(draft_round: DraftRound, survival=None) -> float:
    block = draft_round.survival.shape[1]
    ranges = [range(min(int(limit), block) + 1) for limit in draft_round.limits]
    return max(rate(draft_round, depths, survival) for depths in itertools.product(*ranges))


@settings(deadline=None, max_examples=300)
@given(rounds(max_requests=4, max_block=3, convex=True))
def test_causal_is_optimal_on_unimodal_curves(draft_round):
    """A concave gain over a convex time has one peak."""
    assert rate(draft_round, Causal().depths(draft_round)) == pytest.approx(brute_force(draft_round), rel=1e-12)


@settings(deadline=None, max_examples=200)
@given(rounds(max_requests=4, max_block=3))
def test_lagged_is_optimal_on_any_curve_where_nothing_changed(draft_round):
    draft_round = replace(draft_round, survival=draft_round.lagged_survival)
    assert rate(draft_round, Lagged().depths(draft_round)) == pytest.approx(brute_force(draft_round), rel=1e-12)


@settings(deadline=None, max_examples=200)
@given(rounds(max_requests=4, max_block=3))
def test_lagged_gives_its_budget_to_the_best_live_drafts(draft_round):
    depths = Lagged().depths(draft_round)
    flat = replace(draft_round, seconds=np.full_like(draft_round.seconds, np.inf))
    flat.seconds[int(depths.sum())] = 1.0
    assert rate(flat, depths) == pytest.approx(brute_force(flat), rel=1e-12)


@settings(deadline=None, max_examples=200)
@given(rounds())
def test_causal_never_falls_below_no_speculation(draft_round):
    depths = Causal().depths(draft_round)
    assert rate(draft_round, depths) >= rate(draft_round, 0 * depths) * (1 - 1e-12)


@pytest.mark.parametrize("policy", EVERY, ids=str)
@settings(deadline=None)
@given(draft_round=rounds())
def test_depths_stay_within_limits_and_block(policy, draft_round):
    depths = policy.depths(draft_round)
    assert depths.shape == draft_round.limits.shape
    assert depths.dtype == np.int64
    assert (depths >= 0).all()
    assert (depths <= np.minimum(draft_round.limits, draft_round.survival.shape[1])).all()


def admitted_without_looking_ahead(
    policy: DepthPolicy, draft_round: DraftRound, request: int, place: int, tail: np.ndarray
) -> bool:
    """Whether draft ``place`` (from 1) of ``request`` has the same fate whatever lies behind it.

    Survivals at ``place`` + 1 and later are functions of the token drawn at ``place``; ``tail`` stands for what they
    would be with another token. Where the draft is not admitted, that token must influence nobody else's depth either:
    it was drawn and thrown away, and the joint distribution of the batch would know of it.
    """
    other = draft_round.survival.copy()
    other[request, place:] = other[request, place - 1] * tail
    before, after = (policy.depths(one) for one in (draft_round, replace(draft_round, survival=other)))
    if (before[request] >= place) != (after[request] >= place):
        return False
    return bool(before[request] >= place) or bool((before == after).all())


@st.composite
def changes(draw_value):
    draft_round = draw_value(rounds())
    count, block = draft_round.survival.shape
    assume(block > 1)
    request, place = draw_value(st.integers(0, count - 1)), draw_value(st.integers(1, block - 1))
    tail = draw_value(st.lists(confidences, min_size=block - place, max_size=block - place))
    return draft_round, request, place, np.cumprod(tail)


@pytest.mark.parametrize("policy", EVERY, ids=str)
@settings(deadline=None, max_examples=400)
@given(change=changes())
def test_admission_does_not_look_ahead(policy, change):
    assert admitted_without_looking_ahead(policy, *change)


def look_ahead_cases(cases: int):
    generator = np.random.default_rng(7)
    for _ in range(cases):
        count, block = int(generator.integers(1, 4)), int(generator.integers(2, 4))
        survival = np.cumprod(generator.choice([0.1, 0.5, 0.9, 1.0], (count, block)), axis=1)
        seconds = generator.choice([0.5, 1.0, 2.0], count * block + 1)
        place = int(generator.integers(1, block))
        tail = np.cumprod(generator.choice([0.0, 0.5, 1.0], block - place))
        yield make_round(survival, seconds), int(generator.integers(count)), place, tail


def test_control_the_best_live_depths_look_ahead():
    assert not all(admitted_without_looking_ahead(Retrospective(), *case) for case in look_ahead_cases(300))
    for policy in DYNAMIC:
        assert all(admitted_without_looking_ahead(policy, *case) for case in look_ahead_cases(300))


# Appendix A: SPS = 1, .5, .45; both drafts' first survival is 1 - TV = .8; the second depends on the first draft.
SPS = 1 / np.array([1.0, 0.5, 0.45])


@pytest.mark.parametrize("second", [0.0, 1.0])
def test_the_papers_counterexample(second):
    draft_round = make_round([[0.8, 0.8 * second]], SPS)
    assert Causal().depths(draft_round).tolist() == [0]
    assert Retrospective().depths(draft_round).tolist() == [2 if second else 0]
    past = [[[0.8, 0.8]], [[0.8, 0.0]]]
    assert [Lagged().depths(make_round([[0.8, 0.8 * second]], SPS, lagged)).tolist() for lagged in past] == [[2], [0]]


@settings(max_examples=300, deadline=None)
@given(rounds(max_requests=30, max_block=7))
def test_many_and_few_drafts_are_scheduled_alike(draft_round):
    """Few drafts go through plain Python, many through arrays."""
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for few in (0, 1 << 30):
            patch.setattr(scheduling, "_FEW", few)
            found.append(Causal().depths(draft_round).tolist())
    assert found[0] == found[1]


def test_lagged_sees_beyond_a_cliff_that_stops_causal():
    """One more token costs a second kernel launch; seven more cost nothing beyond that."""
    draft_round = make_round([0.9 ** np.arange(1, 9)], [1.0, *[2.0] * 7, 4.0])
    assert Causal().depths(draft_round).tolist() == [0]
    assert Lagged().depths(draft_round).tolist() == [7]
    assert rate(draft_round, [7]) > 2 * rate(draft_round, [0])


def test_causal_stops_where_throughput_only_stays_equal():
    assert Causal().depths(make_round([[0.5, 0.5]], [1.0, 1.5, 1.5])).tolist() == [0]


def test_nothing_pays_behind_a_certain_rejection():
    assert Causal().depths(make_round([[0.0, 0.0], [1.0, 0.0]], [1.0, 1.0, 1.0, 1.0, 1.0])).tolist() == [0, 1]


@settings(deadline=None, max_examples=200)
@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_requests_decides_ties_alone(draft_round, random):
    order = list(range(draft_round.num_requests))
    random.shuffle(order)
    permuted = replace(
        draft_round,
        survival=draft_round.survival[order],
        lagged_survival=draft_round.lagged_survival[order],
        limits=draft_round.limits[order],
    )
    for policy in EVERY:
        first, second = policy.depths(draft_round), policy.depths(permuted)
        assert first.sum() == second.sum()
        np.testing.assert_array_equal(policy.depths(draft_round), first, err_msg="not deterministic")
        values = draft_round.survival[draft_round.survival > 0]
        if len(np.unique(values)) == draft_round.survival.size:
            np.testing.assert_array_equal(second, first[order])


def test_ties_go_by_place_then_by_request():
    seconds = [1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0]
    assert Causal().depths(make_round([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], seconds)).tolist() == [1, 1, 1]
    survival = [[0.5, 0.5], [1.0, 0.5], [0.5, 0.5]]
    for budget, depths in enumerate([[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2]]):
        draft_round = make_round(survival, np.where(np.arange(7) <= budget, 1.0, 9.0))
        for policy in (Causal(), Lagged()):
            assert policy.depths(draft_round).tolist() == depths


def test_limits_free_the_budget_for_others():
    seconds = [1.0, 1.0, 1.0, 9.0, 9.0]
    assert Lagged().depths(make_round([[0.9, 0.8], [0.5, 0.4]], seconds)).tolist() == [2, 0]
    assert Lagged().depths(make_round([[0.9, 0.8], [0.5, 0.4]], seconds, limits=[1, 2])).tolist() == [1, 1]
    assert Causal().depths(make_round([[0.9, 0.8], [0.5, 0.4]], seconds, limits=[0, 0])).tolist() == [0, 0]


def test_base_tokens_of_other_policies_count():
    """The dearer the step is anyway, the less one more draft must bring to pay."""
    seconds = [1.0, 1.2]
    assert Causal().depths(make_round([[0.3]], seconds)).tolist() == [1]
    assert Causal().depths(make_round([[0.3]], seconds, base=2.5)).tolist() == [0]
    assert Lagged().depths(make_round([[0.3]], seconds, base=2.5)).tolist() == [0]
    assert Lagged().depths(make_round([[0.3]], seconds)).tolist() == [1]


def test_static_policies():
    draft_round = make_round([[0.9, 0.5, 0.4], [0.5, 0.49, 0.4], [0.4, 0.4, 0.4]], np.ones(10), limits=[3, 3, 3])
    assert Off().depths(draft_round).tolist() == [0, 0, 0]
    assert Fixed(2).depths(draft_round).tolist() == [2, 2, 2]
    assert Fixed(2).depths(replace(draft_round, limits=np.array([0, 1, 9]))).tolist() == [0, 1, 2]
    assert Threshold(0.5).depths(draft_round).tolist() == [2, 1, 0]
    assert Threshold(0.0).depths(draft_round).tolist() == [3, 3, 3]
    assert [policy.drafts for policy in (Off(), Fixed(1), Threshold(0.5), Causal(), Lagged())] == [False] + [True] * 4


@pytest.mark.parametrize("policy", EVERY, ids=str)
def test_no_drafts_and_no_requests(policy):
    for count, block in ((3, 0), (0, 4)):
        empty = make_round(np.empty((count, block)), np.ones(1), limits=np.full(count, 5))
        assert policy.depths(empty).tolist() == [0] * count


@pytest.mark.parametrize("policy", DYNAMIC, ids=str)
def test_what_is_not_a_number_is_not_verified(policy):
    draft_round = make_round([[np.nan, np.nan], [0.9, 0.8], [0.9, np.nan]], np.ones(7), lagged=np.ones((3, 2)))
    assert policy.depths(replace(draft_round, limits=np.array([2, 2, 1]))).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "text, policy",
    [
        ("off", Off()),
        ("causal", Causal()),
        ("lagged", Lagged()),
        ("fixed:0", Fixed(0)),
        ("fixed:3", Fixed(3)),
        ("threshold:0.5", Threshold(0.5)),
        ("threshold:1", Threshold(1.0)),
    ],
)
def test_parse_policy(text, policy):
    assert parse_policy(text) == policy


WRONG = ["", "Off", "off:", "causal:", "causal:1", "lagged:2", "fastest", "fixed:1:2"]
WRONG += [f"fixed{end}" for end in ("", ":", ":-1", ":1.5", ":x")]
WRONG += [f"threshold{end}" for end in ("", ":", ":-0.1", ":1.1", ":nan", ":inf")]


@pytest.mark.parametrize("text", WRONG)
def test_parse_policy_says_what_it_expects(text):
    with pytest.raises(ValueError) as caught:
        parse_policy(text)
    assert POLICY_FORMS in str(caught.value)
    assert repr(text) in str(caught.value)
