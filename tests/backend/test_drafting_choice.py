"""Who drafts: pure choices by expected survival and cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.drafting_choice import most_gainful
from dspark_backend.round_cost import RoundCost
from dspark_backend.scheduling import DraftRound, best_throughput

BLOCK = 4
GOOD, BAD = np.array([0.95, 0.9, 0.85, 0.8]), np.array([0.3, 0.1, 0.03, 0.01])


def cost(token: float, draft: float) -> RoundCost:
    """A step of 16 requests takes 1 and ``token`` for each token more, a draft ``draft`` a request."""
    verify = tuple(StepCurve(n, 128, (1, 2), (1.0, 1.0 + token * n)) for n in (1, 16))
    drafting = tuple(StepCurve(n, 128, (1,), (draft * n,)) for n in (1, 16))
    return RoundCost(CostModel(verify=verify, draft=drafting), BLOCK)


def limits(count: int, most: int = BLOCK) -> np.ndarray:
    return np.full(count, most, dtype=np.int64)


def test_those_with_good_drafts_alone_where_a_draft_has_its_price():
    mixed = np.array([BAD, GOOD, BAD, GOOD, BAD, BAD, BAD, GOOD])
    chosen = most_gainful(mixed, limits(8), 8, 128, cost(0.05, 0.08))
    assert chosen and set(chosen) <= {1, 3, 7}


def test_everybody_where_drafts_are_cheap_and_nobody_where_they_are_dear():
    same = np.tile(GOOD, (6, 1))
    assert most_gainful(same, limits(6), 6, 128, cost(0.01, 0.01)) == list(range(6))
    assert most_gainful(same, limits(6), 6, 128, cost(0.5, 0.5)) == []
    assert most_gainful(np.tile(BAD, (6, 1)), limits(6), 6, 128, cost(0.05, 0.05)) == []


def test_an_answer_about_to_end_gains_little():
    same = np.tile(GOOD, (4, 1))
    room = np.array([1, 4, 1, 4], dtype=np.int64)
    assert set(most_gainful(same, room, 4, 128, cost(0.02, 0.25))) <= {1, 3}


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=BLOCK, max_size=BLOCK), min_size=1, max_size=12),
    st.floats(1e-3, 0.6),
    st.floats(1e-3, 0.6),
)
def test_the_choice_is_never_worse_than_all_or_none(rows, token, draft):
    survival = np.minimum.accumulate(np.array(rows), axis=1)
    count = len(survival)
    times = cost(token, draft)

    def expected(chosen: list[int]) -> float:
        if not chosen:
            return count / float(times.round_seconds(count, 0, 0, 128)[0])
        mine = survival[chosen]
        seconds = times.round_seconds(count, len(chosen), BLOCK * len(chosen), 128)
        return best_throughput(DraftRound(mine, mine, limits(len(chosen)), seconds, count))

    chosen = most_gainful(survival, limits(count), count, 128, times)
    assert chosen == sorted(set(chosen))
    assert expected(chosen) >= max(expected([]), expected(list(range(count)))) * (1 - 1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_equal_ones_go_by_row(count):
    chosen = most_gainful(np.tile(GOOD, (count, 1)), limits(count), count, 128, cost(0.1, 0.1))
    assert chosen == list(range(len(chosen)))
