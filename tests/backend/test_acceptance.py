"""The acceptance rule is lossless: what comes out is distributed as p, computed exactly rather than sampled."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.acceptance import Proposal, accepts, residual
from dspark_backend.sampling import draw

TOLERANCE = 1e-12


def acceptance(target: np.ndarray, proposal: Proposal, token: int) -> float:
    """Measure of the uniforms in [0, 1) that accept a draft, found by bisection."""
    if not accepts(target, proposal, token, 0.0):
        return 0.0
    low, high = 0.0, 1.0
    if accepts(target, proposal, token, math.nextafter(1.0, 0.0)):
        return 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if accepts(target, proposal, token, middle) else (low, middle)
    return high


def outcome(target: np.ndarray, proposal: Proposal) -> np.ndarray:
    """Exact distribution of the token of one position: drafted, then accepted or replaced."""
    result = np.zeros_like(target)
    weights = residual(target, proposal)
    for token, chance in zip(proposal.candidates.tolist(), proposal.probabilities.tolist(), strict=True):
        stands = acceptance(target, proposal, token)
        result[token] += chance * stands
        result += chance * (1 - stands) * weights / weights.sum()
    return result


def normalised(weights: list[int]) -> np.ndarray:
    return np.array(weights, dtype=np.float64) / sum(weights)


@st.composite
def pairs(draw_value):
    """p with zeros [V], and q over K <= V candidates in any order, also with zeros."""
    size = draw_value(st.integers(1, 9))
    weight = st.one_of(st.just(0), st.integers(0, 1000), st.sampled_from([1, 10**6, 10**9]))
    target = draw_value(st.lists(weight, min_size=size, max_size=size).filter(any))
    candidates = draw_value(st.permutations(range(size)))[: draw_value(st.integers(1, size))]
    drafted = draw_value(st.lists(weight, min_size=len(candidates), max_size=len(candidates)).filter(any))
    return normalised(target), Proposal(np.array(candidates), normalised(drafted))


@settings(deadline=None, max_examples=200)
@given(pairs())
def test_the_outcome_is_distributed_as_the_target(pair):
    target, proposal = pair
    assert np.abs(outcome(target, proposal) - target).max() <= TOLERANCE


@settings(deadline=None)
@given(pairs())
def test_no_outcome_has_target_probability_zero(pair):
    target, proposal = pair
    assert not outcome(target, proposal)[target == 0].any()


@settings(deadline=None)
@given(pairs())
def test_the_chance_to_stand_is_the_overlap(pair):
    """1 - TV(p, q), which the confidence head is trained on."""
    target, proposal = pair
    drafted = np.zeros_like(target)
    drafted[proposal.candidates] = proposal.probabilities
    stands = sum(
        chance * acceptance(target, proposal, token)
        for token, chance in zip(proposal.candidates.tolist(), proposal.probabilities.tolist(), strict=True)
    )
    assert stands == pytest.approx(np.minimum(target, drafted).sum(), abs=TOLERANCE)


@pytest.mark.parametrize(
    "target, candidates, drafted",
    [
        pytest.param([0.7, 0.3], [0, 1], [0.5, 0.5], id="the paper's"),
        pytest.param([0.25, 0.25, 0.5], [0, 1, 2], [0.25, 0.25, 0.5], id="equal"),
        pytest.param([0.0, 0.0, 0.4, 0.6], [0, 1], [0.5, 0.5], id="disjoint"),
        pytest.param([0.1, 0.2, 0.3, 0.4], [3], [1.0], id="a certain draft"),
        pytest.param([0.0, 1.0, 0.0], [2, 0, 1], [0.4, 0.5, 0.1], id="a certain target"),
        pytest.param([0.5, 0.0, 0.5], [1, 2], [0.0, 1.0], id="a candidate of probability zero"),
        pytest.param([1.0], [0], [1.0], id="one token"),
    ],
)
def test_by_hand(target, candidates, drafted):
    proposal = Proposal(np.array(candidates), np.array(drafted))
    np.testing.assert_allclose(outcome(np.array(target), proposal), target, rtol=0, atol=1e-15)


def test_control_a_rule_with_p_and_q_swapped_is_found():
    target, drafted = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    swapped = Proposal(np.arange(2), target)
    stands = np.array([acceptance(drafted, swapped, token) for token in range(2)])
    weights = residual(target, Proposal(np.arange(2), drafted))
    result = drafted * stands + (drafted * (1 - stands)).sum() * weights / weights.sum()
    assert np.abs(result - target).max() > 0.05


GRIDS = [
    ((3, 2, 1), (1, 2, 3)),
    ((0, 3, 3), (2, 2, 2)),
    ((5, 0, 1), (0, 6, 0)),
    ((2, 2, 2), (2, 2, 2)),
    ((1, 4, 1), (4, 1, 1)),
    ((6, 0, 0), (1, 1, 4)),
]


@pytest.mark.parametrize("target_sixths, draft_sixths", GRIDS)
def test_every_uniform_of_a_grid(target_sixths, draft_sixths):
    """The rule with its real draws over all midpoints of a grid so fine that no probability falls between: exact."""
    target, drafted = np.array(target_sixths) / 6, np.array(draft_sixths) / 6
    proposal = Proposal(np.arange(3), drafted)
    grid = [(step + 0.5) / 60 for step in range(60)]  # 60 is a multiple of 1 to 6
    counts: Counter[int] = Counter()
    for first, second in itertools.product(grid[5::10], grid):
        token = draw(drafted, first)
        if accepts(target, proposal, token, second):
            counts[token] += 60
        else:
            counts.update(draw(residual(target, proposal), third) for third in grid)
    total = 6 * 60 * 60
    assert [Fraction(counts[token], total) for token in range(3)] == [Fraction(part, 6) for part in target_sixths]


def test_probability_is_zero_outside_the_candidates():
    proposal = Proposal(np.array([7, 2]), np.array([0.25, 0.75], dtype=np.float32))
    assert [proposal.of(token) for token in (7, 2, 0)] == [0.25, 0.75, 0.0]


def test_the_edges_of_the_uniform():
    target, proposal = np.array([0.0, 0.5, 0.5]), Proposal(np.array([0, 1]), np.array([0.5, 0.5]))
    assert not accepts(target, proposal, 0, 0.0), "a token that the target excludes, with the smallest uniform"
    assert accepts(target, proposal, 1, math.nextafter(1.0, 0.0)), "p = q, with the largest uniform"


def test_residual_leaves_its_inputs_alone():
    target, proposal = np.array([0.7, 0.3]), Proposal(np.array([1, 0]), np.array([0.5, 0.5]))
    weights = residual(target, proposal)
    np.testing.assert_allclose(weights, [0.2, 0.0])
    np.testing.assert_array_equal(target, [0.7, 0.3])
    np.testing.assert_array_equal(proposal.probabilities, [0.5, 0.5])


def test_residual_without_mass_is_the_target():
    target = np.array([0.25, 0.75])
    np.testing.assert_array_equal(residual(target, Proposal(np.array([0, 1]), target.copy())), target)
    # q a little above p everywhere, as after float32.
    np.testing.assert_array_equal(residual(target, Proposal(np.array([0, 1]), target * (1 + 1e-7))), target)


def test_a_broken_drafter_costs_speed_alone():
    """NaN never stands, and what replaces it is drawn from p."""
    target, proposal = np.array([0.25, 0.75]), Proposal(np.array([0, 1]), np.array([np.nan, np.nan]))
    assert not accepts(target, proposal, 0, 0.5)
    np.testing.assert_array_equal(residual(target, proposal), target)


@settings(deadline=None)
@given(pairs())
def test_float32_proposals_are_lossless_to_their_precision(pair):
    target, proposal = pair
    rounded = Proposal(proposal.candidates, proposal.probabilities.astype(np.float32))
    assert np.abs(outcome(target, rounded) - target).max() <= 1e-6
