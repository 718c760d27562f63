"""A distribution by the head of its ranking gives the answers that the whole row gives, or none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking import ranked_rows

from dspark_backend import acceptance
from dspark_backend.acceptance import Proposal
from dspark_backend.ranked import Head, head_of, ranking_temperature
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_backend.sampling import SamplingContext, draw, target_distribution

UNIFORM = st.floats(0.0, 1.0, exclude_max=True)


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    return target_distribution(logits, params, SamplingContext([]))


def head(logits: np.ndarray, params: SamplingParams, count: int, **options) -> Head | None:
    return head_of(ranked_rows(logits[None], params.temperature, count, **options), 0, params)


def chances(found: Head) -> np.ndarray:
    return found.weights / (sum(found.totals) / 2)


@st.composite
def rows(draw_value):
    """Logits [V] full of ties or without any, parameters, how many are ranked."""
    size = draw_value(st.integers(1, 30))
    coarse = st.one_of(st.integers(-4, 4).map(float), st.just(-np.inf))
    fine = st.floats(-8.0, 8.0, width=32)
    logits = draw_value(st.lists(draw_value(st.sampled_from([coarse, fine])), min_size=size, max_size=size))
    logits[draw_value(st.integers(0, size - 1))] = 3.0
    params = SamplingParams(
        temperature=draw_value(st.sampled_from([0.05, 0.5, 1.0, 2.5])),
        top_k=draw_value(st.sampled_from([0, 0, 1, 3, 12])),
        top_p=draw_value(st.sampled_from([1.0, 1.0, 0.1, 0.5, 0.75, 0.95])),
        min_p=draw_value(st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0])),
    )
    return np.array(logits, dtype=np.float32), params, draw_value(st.integers(1, size))


@st.composite
def proposals(draw_value, size: int):
    """Of up to 8 tokens, some perhaps without a chance."""
    tokens = draw_value(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True))
    weights = draw_value(st.lists(st.integers(0, 50), min_size=len(tokens), max_size=len(tokens)).filter(any))
    return Proposal(np.array(tokens), (np.array(weights) / sum(weights)).astype(np.float32))


@settings(deadline=None, max_examples=400)
@given(rows(), st.integers(0, 3))
def test_the_distribution_is_the_rows(row, seed):
    logits, params, count = row
    found, expected = head(logits, params, count, seed=seed), distribution(logits, params)
    if found is None:
        assert count < logits.size or params.top_p < 1.0, "a sum at the very border"
        return
    assert len(set(found.tokens.tolist())) == len(found.tokens)
    np.testing.assert_allclose(chances(found), expected[found.tokens], rtol=1e-6, atol=1e-12)
    others = np.delete(expected, found.tokens)
    if found.complete:
        assert not others.any() and found.totals[0] == found.totals[1]
        assert (np.diff(found.tokens) > 0).all()
    else:
        assert others.max(initial=0.0) <= expected[found.tokens[-1]] * (1 + 1e-12)


@settings(deadline=None, max_examples=600)
@given(st.data(), rows(), UNIFORM, st.sampled_from([-5e-6, 0.0, 5e-6]))
def test_every_number_has_the_answer_of_the_row(data, row, uniform, error):
    """Draws, drafts that stand and what replaces them, whatever the sum's rounding."""
    logits, params, count = row
    found, expected = head(logits, params, count, error=error), distribution(logits, params)
    if found is None:
        return
    proposal = data.draw(proposals(logits.size))
    drafted = int(data.draw(st.sampled_from(proposal.candidates.tolist())))
    stands = found.accepts(proposal, drafted, uniform)
    assert stands in (None, acceptance.accepts(expected, proposal, drafted, uniform))
    left = acceptance.residual(expected, proposal)
    tokens = found.draw(uniform), found.draw(uniform, proposal)
    if found.complete:
        assert None not in (stands, *tokens)
    for token, weights in zip(tokens, (expected, left), strict=True):
        if token is None:
            continue
        order = found.tokens if found.complete else [*found.tokens, *np.delete(np.arange(logits.size), found.tokens)]
        cumulated = np.cumsum(weights[order])
        # Numbers at the very border of a token round either way.
        near = np.abs(cumulated - uniform * cumulated[-1]).min() <= 1e-12
        assert token == found.place(weights, uniform) or near
    assert {found.place(expected, uniform), found.place(left, uniform)} <= set(np.flatnonzero(expected + left).tolist())


@pytest.mark.parametrize("complete", [True, False])
def test_place_gives_each_token_its_share(complete):
    logits = np.log(np.array([1, 2, 3, 4, 10], dtype=np.float32) / 20)
    found = head(logits, SamplingParams(temperature=1.0, top_k=2 if complete else 0), 3)
    assert found is not None and found.complete == complete
    weights = distribution(logits, SamplingParams(temperature=1.0, top_k=2 if complete else 0))
    grid = [found.place(weights, (step + 0.5) / 140) for step in range(140)]  # 14 and 20 both divide it
    assert [grid.count(token) / 140 for token in range(5)] == pytest.approx(weights.tolist())


def test_tokens_tied_at_the_end_are_for_the_row():
    logits = np.array([0, 5, 1, 1, 1, -3], dtype=np.float32)
    one = SamplingParams(temperature=1.0)
    for params in (replace(one, top_k=2), replace(one, top_k=3), replace(one, min_p=0.01), replace(one, top_p=0.98)):
        assert head(logits, params, 3) is None, params
        found = head(logits, params, 5)
        assert found is not None and found.complete
        assert found.tokens.tolist() == np.flatnonzero(distribution(logits, params)).tolist()
    assert head(logits, replace(one, top_k=1), 3).tokens.tolist() == [1]


def test_logits_whose_scores_are_equal_rank_by_id():
    """As they do in the row: what float32 tells apart near 0 is one number after the largest was subtracted."""
    logits = np.array([3, 0, 0, 0, 8, 1e-30], dtype=np.float32)
    params = SamplingParams(temperature=2.5, top_p=0.89)
    assert head(logits, params, 3) is None
    found = head(logits, params, 6)
    assert found.tokens.tolist() == np.flatnonzero(distribution(logits, params)).tolist() == [0, 1, 4]


def test_a_sum_that_is_not_finite_leaves_it_to_the_row():
    logits = np.linspace(0, 3, 10, dtype=np.float32)
    for value in (np.nan, np.inf):
        ranked = replace(ranked_rows(logits[None], 1.0, 4), exp_sum=np.array([value], dtype=np.float32))
        assert head_of(ranked, 0, SamplingParams(temperature=1.0)) is None
        assert head_of(ranked, 0, SamplingParams(temperature=1.0, top_p=0.5)) is None
        assert head_of(ranked, 0, SamplingParams(temperature=1.0, top_k=2)) is not None


def test_a_broken_proposal_costs_speed_alone():
    logits = np.linspace(0, 3, 10, dtype=np.float32)
    broken = Proposal(np.array([9, 2]), np.array([np.nan, np.nan], dtype=np.float32))
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=3)):
        found = head(logits, params, 4)
        assert found is not None
        assert found.accepts(broken, 9, 0.5) in (None, False)
        if found.complete:
            assert found.draw(0.5, broken) == draw(distribution(logits, params), 0.5)
        else:
            assert found.draw(0.5, broken) is None


def test_a_head_decides_nearly_always():
    """A vocabulary as wide as real ones are, with a tail: what is left to the row is the tail and little more."""
    rng = np.random.default_rng(1)
    size, count = 20_000, 512
    logits = (-1.4 * np.log(1 + rng.permutation(size)) + rng.normal(0, 0.3, size)).astype(np.float32)
    plain = SamplingParams(temperature=1.0)
    found, expected = head(logits, plain, count), distribution(logits, plain)
    drafted = logits + rng.normal(0, 1.5, size)
    candidates = np.argsort(-drafted)[:64]
    q = np.exp(drafted[candidates] - drafted.max())
    proposal = Proposal(candidates, (q / q.sum()).astype(np.float32))
    numbers = rng.random(2000).tolist()
    for weights, given_proposal in ((expected, None), (acceptance.residual(expected, proposal), proposal)):
        tail = np.delete(weights, found.tokens).sum() / weights.sum()
        open_share = np.mean([found.draw(number, given_proposal) is None for number in numbers])
        assert 0.03 < tail < 0.2 and 0.8 * tail < open_share < tail + 0.04
    drafts = zip(candidates.tolist() * 40, numbers, strict=False)
    assert np.mean([found.accepts(proposal, token, number) is None for token, number in drafts]) < 0.02
    for params in (replace(plain, top_p=0.8), replace(plain, top_k=50), replace(plain, min_p=0.05)):
        assert head(logits, params, count).complete


def test_who_reads_rows_anyway_asks_for_no_ranking():
    def asked(log_probs=False, **params):
        return ranking_temperature(
            GenerationRequest(input_ids=(1,), sampling=SamplingParams(**params), log_probs=log_probs)
        )

    assert asked(temperature=0.7) == 0.7
    assert asked() == asked(temperature=0.7, presence_penalty=0.1) == asked(temperature=0.7, log_probs=True) == 0.0
    assert asked(temperature=1e-40) == 0.0, "nothing that float32 has"
