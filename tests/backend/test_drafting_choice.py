"""Who drafts, and how deep: pure choices by expected survival and cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend import drafting_choice
from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.draft_state import DraftState
from dspark_backend.drafting_choice import Chosen, DraftingChoice, most_gainful
from dspark_backend.round_cost import RoundCost
from dspark_backend.scheduling import parse_policy

BLOCK = 4
GOOD, BAD = np.array([0.95, 0.9, 0.85, 0.8]), np.array([0.3, 0.1, 0.03, 0.01])


def cost(token: float, draft: float, place: float = 0.0, slot: float = 0.0) -> RoundCost:
    """A step takes 1 and ``token`` for each token more, a draft ``draft`` a request and, of it, ``slot`` for every slot
    but the first; ``place`` for every place that the widest request has beyond the mean, for each of the requests."""
    verify = tuple(StepCurve(n, 128, (1, 2), (1.0, 1.0 + token * n)) for n in (1, 16))
    drafting = tuple(
        StepCurve(n, 128, (1, BLOCK), (draft * n, (draft + slot * (BLOCK - 1)) * n)) for n in (1, 16)
    )  # fmt: skip
    tokens, mean = 15 + BLOCK + 1, (15 + BLOCK + 1) / 16
    uneven = 1.0 + token * (tokens - 16) + 16 * place * (BLOCK + 1 - mean)
    uneven_curves = (StepCurve(16, 128, (BLOCK + 1,), (uneven,)),) if place else ()
    return RoundCost(CostModel(verify, drafting, uneven_curves), BLOCK)


def alike(survival: np.ndarray) -> np.ndarray:
    """[1, n, g]: every round is as the mean."""
    return np.array(survival)[None]


def limits(count: int, most: int = BLOCK) -> np.ndarray:
    return np.full(count, most, dtype=np.int64)


def test_those_with_good_drafts_alone_where_a_draft_has_its_price():
    mixed = np.array([BAD, GOOD, BAD, GOOD, GOOD, BAD, BAD, GOOD])
    assert most_gainful(alike(mixed), limits(8), 8, 128, cost(0.05, 0.1)).rows == [1, 3, 4, 7]
    # A gain of 8% is one, of 3% is none: not all costs are in the model.
    assert most_gainful(alike(GOOD[None]), limits(1), 1, 128, cost(0.8, 0.05)).rows == [0]
    assert most_gainful(alike(GOOD[None]), limits(1), 1, 128, cost(0.85, 0.05)).rows == []


def test_everybody_where_drafts_are_cheap_and_nobody_where_they_are_dear():
    same = np.tile(GOOD, (6, 1))
    assert most_gainful(alike(same), limits(6), 6, 128, cost(0.01, 0.01)) == Chosen(list(range(6)), BLOCK, BLOCK)
    assert most_gainful(alike(same), limits(6), 6, 128, cost(0.5, 0.5)) == Chosen([], 0)
    assert most_gainful(alike(np.tile(BAD, (6, 1))), limits(6), 6, 128, cost(0.05, 0.05)).rows == []


def test_places_that_everybody_pays_for_keep_blocks_shallow_or_nobody_drafts():
    falling = np.tile([0.8, 0.5, 0.2, 0.1], (16, 1))
    free, dear = cost(0.03, 0.002), cost(0.03, 0.002, place=0.02)
    assert most_gainful(alike(falling), limits(16), 16, 128, free).depth == BLOCK
    assert 1 <= most_gainful(alike(falling), limits(16), 16, 128, dear).depth < BLOCK
    # One good request among many bad ones makes the step longer for all of them.
    one = np.array([GOOD] + [BAD] * 3)
    assert most_gainful(alike(one), limits(4), 4, 128, cost(0.1, 0.01)).rows == [0]
    assert most_gainful(alike(one), limits(4), 4, 128, cost(0.1, 0.01, place=0.3)).rows == []
    # So it does where the drafter takes its time for every slot.
    slots = cost(0.03, 0.002, slot=0.03)
    assert 1 <= most_gainful(alike(falling), limits(16), 16, 128, slots).depth < BLOCK
    # Alone in the batch it does not.
    assert most_gainful(alike(one[:1]), limits(1), 1, 128, dear) == Chosen([0], BLOCK, BLOCK)


def test_rounds_that_turn_out_sure_are_worth_more_than_their_mean():
    rounds = np.array([[[0.99, 0.98, 0.97, 0.96]], [[0.1, 0.01, 0.0, 0.0]]])
    dear = cost(0.6, 0.05)
    # 5.9 tokens in 1.05 + 3.45, the hopeless round without a draft; of the mean no draft is worth its place.
    assert most_gainful(rounds, limits(1), 1, 128, dear) == Chosen([0], BLOCK, BLOCK)
    assert most_gainful(rounds, limits(1), 1, 128, dear).gain == pytest.approx(4.9 / 4.5 + 1 / 4.5)
    assert most_gainful(rounds.mean(axis=0, keepdims=True), limits(1), 1, 128, dear).rows == []


def test_of_nearly_equal_depths_the_shallowest_is_drafted(monkeypatch):
    falling = alike(np.tile([0.9, 0.75, 0.6, 0.5], (16, 1)))

    def choices() -> list[Chosen]:
        prices = np.linspace(0.0, 0.01, 100).tolist()
        return [most_gainful(falling, limits(16), 16, 128, cost(0.03, 0.002, slot=slot)) for slot in prices]

    chosen = choices()
    monkeypatch.setattr(drafting_choice, "_NEARLY", 1.0)
    best = choices()
    assert {one.depth for one in best} >= {1, BLOCK}
    assert all(
        one.depth <= other.depth and one.gain >= 0.99 * other.gain for one, other in zip(chosen, best, strict=True)
    )
    assert any(one.depth < other.depth for one, other in zip(chosen, best, strict=True))


def test_an_answer_about_to_end_gains_little():
    same = np.tile(GOOD, (4, 1))
    room = np.array([1, 4, 1, 4], dtype=np.int64)
    assert set(most_gainful(alike(same), room, 4, 128, cost(0.02, 0.25)).rows) <= {1, 3}


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=BLOCK, max_size=BLOCK), min_size=1, max_size=12),
    st.floats(1e-3, 0.6),
    st.floats(1e-3, 0.6),
    st.sampled_from([0.0, 0.01, 0.1]),
    st.sampled_from([0.0, 0.02]),
    st.lists(st.integers(0, BLOCK), min_size=12, max_size=12),
)
def test_the_choice_is_never_worse_than_all_or_none(rows, token, draft, place, slot, room):
    survival = np.minimum.accumulate(np.array(rows), axis=1)
    count = len(survival)
    most = np.array(room[:count])
    times = cost(token, draft, place, slot)

    def expected(chosen: Chosen) -> float:
        """Tokens a second of the best number of drafts, by trying them all."""
        if not chosen.rows:
            return count / float(times.step_seconds(count, 0, 128, 0)[0])
        drafts = sorted(
            (chance for row in chosen.rows for chance in survival[row, : min(chosen.depth, most[row])]), reverse=True
        )
        if not drafts:
            return 0.0
        seconds = times.step_seconds(count, len(drafts), 128, chosen.depth)
        seconds += times.draft_seconds(len(chosen.rows), 128, chosen.depth)
        return max((count + sum(drafts[:k])) / seconds[k] for k in range(1, len(drafts) + 1))

    chosen = most_gainful(alike(survival), most, count, 128, times)
    assert chosen.rows == sorted(set(chosen.rows))
    everybody = list(range(count))
    alternatives = [Chosen([], 0), Chosen(everybody, BLOCK)]
    if times.depth_costs(count, 128):
        alternatives += [Chosen(everybody, depth) for depth in (1, 2, 3)]
    # Nobody drafts for less than the margin; whoever does is all but the best of these.
    best = max(map(expected, alternatives))
    assert expected(chosen) * (1.04 if not chosen.rows else 1 / 0.99) >= best * (1 - 1e-12)
    if chosen.rows:
        assert expected(chosen) >= 1.04 * expected(alternatives[0]) * (1 - 1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_equal_ones_go_by_row(count):
    rows = most_gainful(alike(np.tile(GOOD, (count, 1))), limits(count), count, 128, cost(0.1, 0.1)).rows
    assert rows == list(range(len(rows)))


@dataclass(eq=False)
class Running:
    """Of a running sequence, what a choice reads."""

    number: int
    policy: str
    survival: np.ndarray | None = None
    idle: int = 0
    prepared: Any = field(init=False)
    draft: DraftState = field(init=False)

    def __post_init__(self) -> None:
        self.prepared = SimpleNamespace(policy=parse_policy(self.policy))
        self.draft = DraftState(expected=self.survival, idle_rounds=self.idle)


def choose(choice, running, room=None, prior=BAD):
    room = [0 if one.policy == "off" else BLOCK for one in running] if room is None else room
    return choice.choose(running, np.array(room), 128, prior)


def test_a_choice_holds_while_others_come_and_go():
    off, bad, good = Running(1, "off"), Running(2, "causal", BAD), Running(3, "causal", GOOD)
    choice = DraftingChoice(cost(0.1, 0.05), BLOCK)
    assert choose(choice, [off, bad, good]).rows == [2]
    # The one in front has ended: the rows are others, the sequences are the same.
    assert choose(choice, [bad, good]).rows == [1]
    assert choose(choice, [off, good, bad]).rows == [1]
    assert choose(choice, [good, off, bad]).rows == [0]


def test_static_policies_draft_always_and_all_before_anything_is_known():
    fixed, bad = Running(1, "fixed:2"), Running(2, "lagged", BAD)
    choice = DraftingChoice(cost(0.5, 0.5), BLOCK)
    assert choose(choice, [fixed, bad]).rows == [0]
    assert choose(choice, [bad], prior=None) == Chosen([0], BLOCK, BLOCK)
    assert choose(choice, [fixed], room=[0]).rows == []


def test_new_ones_are_tried_along_with_others_or_when_a_quarter_of_the_batch_is_new():
    dear, cheap = cost(0.05, 0.05), cost(0.03, 0.05)
    known = [Running(number, "causal", BAD) for number in range(6)]
    new = [Running(10 + number, "lagged") for number in range(2)]
    middling = np.array([0.5, 0.3, 0.2, 0.1])
    assert choose(DraftingChoice(dear, BLOCK), known[:3] + new[:1], prior=middling).rows == [3]
    assert choose(DraftingChoice(dear, BLOCK), known[:4] + new[:1], prior=middling).rows == []
    assert choose(DraftingChoice(cost(0.03, 0.02), BLOCK), known + new, prior=middling).rows == [6, 7]
    # Where even good ones would not pay, nobody is tried.
    assert choose(DraftingChoice(cost(1.0, 1.0), BLOCK), known + new, prior=middling).rows == []
    good = Running(20, "causal", GOOD)
    # How many draft is tried in quarters: beside the good one there is another.
    assert choose(DraftingChoice(cheap, BLOCK), [*known, good]).rows == [0, 6]
    assert choose(DraftingChoice(cheap, BLOCK), [*known, good, new[0]]).rows == [0, 6, 7]


def test_who_rested_long_looks_again_along_with_those_that_rested_half_as_long():
    rested = [Running(n, "causal", BAD, idle) for n, idle in enumerate((48, 30, 10))]
    assert choose(DraftingChoice(cost(0.5, 0.5), BLOCK), rested) == Chosen([0, 1], BLOCK, BLOCK)
    assert choose(DraftingChoice(cost(0.5, 0.5), BLOCK), rested[1:]).rows == []
    # Where depth costs all of them, one draft each is enough to learn from.
    assert choose(DraftingChoice(cost(0.5, 0.5, place=0.05), BLOCK), rested) == Chosen([0, 1], 1, 2)


def test_now_and_then_a_slot_more_is_drafted_than_may_be_verified():
    falling = np.array([0.9, 0.3, 0.1, 0.05])
    running = [Running(number, "causal", falling) for number in range(16)]
    choice = DraftingChoice(cost(0.03, 0.002, slot=0.03), BLOCK)
    rounds = [choose(choice, running) for _ in range(24)]
    assert [one.width for one in rounds] == ([1] * 11 + [2]) * 2
    assert {one.depth for one in rounds} == {1}


def test_depth_that_others_need_anyway_is_not_paid_twice():
    rows = np.tile(GOOD, (3, 1))
    times = cost(0.03, 0.002, place=0.3)
    alone = most_gainful(alike(rows[:1]), limits(1), 8, 128, times)
    beside = most_gainful(alike(rows[:1]), limits(1), 8, 128, times, floor=BLOCK)
    assert alone.rows == [] and beside == Chosen([0], BLOCK, BLOCK)


def test_where_drafting_hardly_pays_a_round_without_it_shows_what_it_costs():
    def rounds(price: float) -> list[int]:
        """How many of two drafted, round by round; each step takes what was predicted."""
        model = cost(price, 0.01)
        choice, running = DraftingChoice(model, BLOCK), [Running(number, "causal", GOOD) for number in (1, 2)]
        found = []
        for _ in range(120):
            chosen = choose(choice, running)
            drafts, depth = len(chosen.rows) * chosen.depth, chosen.depth
            predicted = model.verify_seconds(2, drafts, 128, depth)
            model.observe_verify(2, drafts, 128, depth, predicted)
            found.append(len(chosen.rows))
        return found

    dear, cheap = rounds(0.3), rounds(0.1)
    assert dear.count(0) == 2 and dear.count(2) == 118
    assert cheap.count(2) == 120
