"""The target distribution against a slow reference, and the draw at the edges of its range."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark_backend.bad_words import BadWords, TokenMask
from dspark_backend.errors import DSparkError, InvalidRequest, Status
from dspark_backend.penalties import SamplingContext
from dspark_backend.request import SamplingParams
from dspark_backend.sampling import (
    draw,
    greedy_token,
    log_probability,
    needs_logits,
    target_distribution,
    top_k_ids,
)


def reference(logits, params, prompt, output, mask) -> np.ndarray:
    """Token by token, with plain Python numbers and a full sort."""
    scores = [float(value) for value in logits]
    for sequence in mask.bad_words.sequences:
        head = list(sequence[:-1])
        if not head or output[-len(head) :] == head:
            scores[sequence[-1]] = -math.inf
    if len(output) < mask.min_tokens:
        for token in mask.end_ids:
            scores[token] = -math.inf
    for token in set(prompt) | set(output):
        if scores[token] > 0:
            scores[token] /= params.repetition_penalty
        else:
            scores[token] *= params.repetition_penalty
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    ranking = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    result = np.zeros(len(scores))
    if params.temperature == 0:
        result[ranking[0]] = 1.0
        return result
    best = scores[ranking[0]]
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    ranking = [token for token in ranking if weights[token] >= params.min_p]
    if params.top_k > 0:
        ranking = ranking[: params.top_k]
    total = sum(weights[token] for token in ranking)
    cumulated = 0.0
    for token in ranking:
        result[token] = weights[token]
        cumulated += weights[token]
        if params.top_p < 1 and cumulated >= params.top_p * total:
            break
    return result / result.sum()


# Quarters are exact in float32 and collide often, which makes ties common. The awkward fractions below keep top-p and
# min-p off the boundaries where two correct summation orders may differ.
quarters = st.integers(-40, 40).map(lambda n: n / 4)


@st.composite
def cases(draw_value):
    size = draw_value(st.integers(1, 70))
    logits = np.array(draw_value(st.lists(quarters, min_size=size, max_size=size)), dtype=np.float32)
    tokens = st.integers(0, size - 1)
    params = SamplingParams(
        temperature=draw_value(st.sampled_from([0.0, 1e-3, 0.31, 1.0, 1.7, 100.0])),
        top_k=draw_value(st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 1000])),
        top_p=draw_value(st.sampled_from([1e-9, 0.1234567, 0.4567891, 0.8912345, 0.9912347, 1.0])),
        min_p=draw_value(st.sampled_from([0.0, 0.0123456, 0.2345678, 0.9876543, 1.0])),
        repetition_penalty=draw_value(st.sampled_from([1.0, 0.5, 2.0])),
        presence_penalty=draw_value(st.sampled_from([0.0, -0.5, 1.25])),
        frequency_penalty=draw_value(st.sampled_from([0.0, -0.25, 0.5])),
    )
    prompt = draw_value(st.lists(tokens, max_size=8))
    output = draw_value(st.lists(tokens, max_size=8))
    words = draw_value(st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4))
    mask = TokenMask(
        BadWords(tuple(words)), draw_value(st.integers(0, 9)), tuple(draw_value(st.sets(tokens, max_size=2)))
    )
    return logits, params, prompt, output, mask


@settings(deadline=None)
@given(cases())
def test_matches_the_reference(case):
    logits, params, prompt, output, mask = case
    context = SamplingContext(prompt)
    context.extend(output)
    before = logits.copy()
    if len(set(mask.banned(output).tolist())) == logits.size:
        with pytest.raises(InvalidRequest, match="at least one of"):
            target_distribution(logits, params, context, mask)
        return
    got = target_distribution(logits, params, context, mask)
    expected = reference(logits, params, prompt, output, mask)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-300)
    assert got.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_array_equal(logits, before)
    if params.greedy:
        assert greedy_token(logits, params, context, mask) == expected.argmax()
    if not needs_logits(params, mask, len(output)):
        assert expected.argmax() == logits.argmax()


@pytest.mark.parametrize("deviation", [0.0, 1e-6, 0.05, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1 - 1e-12, math.nextafter(1, 0)])
def test_nucleus_of_a_large_vocabulary(deviation, top_p):
    generator = np.random.default_rng(3)
    logits = generator.normal(0, deviation, 20_000).astype(np.float32)
    logits[generator.integers(0, logits.size, 500)] = -np.inf
    got = target_distribution(logits, SamplingParams(temperature=0.9, top_p=top_p), SamplingContext([]))
    weights = np.exp((logits.astype(np.float64) - logits.max()) / 0.9)
    order = np.argsort(-logits, kind="stable")
    cumulated = np.cumsum(weights[order]) / weights.sum()
    # Rounding may move the end of the head by the tokens whose sums are within it.
    least = np.searchsorted(cumulated, top_p - 1e-12) + 1
    most = np.searchsorted(cumulated, top_p + 1e-12) + 1
    kept = np.count_nonzero(got)
    assert least <= kept <= most
    np.testing.assert_array_equal(np.sort(order[:kept]), np.flatnonzero(got))
    np.testing.assert_allclose(got[order[:kept]], weights[order[:kept]] / weights[order[:kept]].sum(), rtol=1e-9)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2100), st.integers(1, 300), st.integers(0, 2**32 - 1))
@example(1600, 25, 1, 0)
def test_top_k_keeps_exactly_k_and_the_lower_ids_of_ties(size, k, values, seed):
    logits = np.random.default_rng(seed).integers(0, values, size).astype(np.float32)
    ids = top_k_ids(logits, k)
    assert ids.size == min(k, size)
    np.testing.assert_array_equal(ids, np.sort(np.argsort(-logits, kind="stable")[:k]))


def test_top_k_with_fewer_possible_tokens_than_k():
    logits = np.full(4096, -np.inf, dtype=np.float32)
    logits[[7, 4000]] = 1.0
    got = target_distribution(logits, SamplingParams(temperature=1.0, top_k=20), SamplingContext([]))
    assert {int(token): got[token] for token in np.flatnonzero(got)} == {7: 0.5, 4000: 0.5}


def test_tiny_temperature_does_not_overflow():
    logits = np.array([1e30, -1e30, 5.0, 1e30], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        for temperature in (1e-3, 1e-30, 1e-300):
            got = target_distribution(logits, SamplingParams(temperature=temperature), SamplingContext([]))
            np.testing.assert_array_equal(got, [0.5, 0, 0, 0.5])


def test_one_token_left_by_the_mask():
    mask = TokenMask(BadWords(((0,), (1,), (3,))), min_tokens=1, end_ids=(4,))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1)
        got = target_distribution(np.array([9, 9, -9, 9, 9], dtype=np.float32), params, SamplingContext([]), mask)
        np.testing.assert_array_equal(got, [0, 0, 1, 0, 0])


def test_no_token_left_is_the_requests_fault():
    mask = TokenMask(BadWords(((0,),)), min_tokens=1, end_ids=(1,))
    logits = np.zeros(2, dtype=np.float32)
    for action in (greedy_token, target_distribution):
        with pytest.raises(InvalidRequest, match="bad_words and min_tokens: expected at least one of 2 tokens"):
            action(logits, SamplingParams(), SamplingContext([]), mask)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 17, 99])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_internal_error(broken, position, temperature):
    logits = np.linspace(-5, 5, 100, dtype=np.float32)
    logits[position] = broken
    mask = TokenMask(BadWords(((position,),)))
    with pytest.raises(DSparkError, match="expected finite numbers from the target") as caught:
        target_distribution(logits, SamplingParams(temperature=temperature), SamplingContext([]), mask)
    assert caught.value.status is Status.INTERNAL
    with pytest.raises(DSparkError, match="expected finite numbers"):
        log_probability(logits, 3)


def test_only_minus_infinity_is_an_internal_error():
    with pytest.raises(DSparkError, match="nothing but -inf") as caught:
        target_distribution(np.full(5, -np.inf, dtype=np.float32), SamplingParams(), SamplingContext([]))
    assert caught.value.status is Status.INTERNAL


def test_positions_of_a_draft_equal_the_positions_of_its_sequence():
    generator = np.random.default_rng(5)
    logits = generator.normal(0, 2, (5, 40)).astype(np.float32)
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.5)
    mask = TokenMask(BadWords(((3, 8), (30,))), min_tokens=4, end_ids=(1,))
    context = SamplingContext([5, 6, 7])
    context.extend([9, 3])
    drafts = [9, 3, 3, 12]
    got = []
    for position in range(5):
        got.append(target_distribution(logits[position], params, context, mask))
        expected = reference(logits[position], params, [5, 6, 7], [9, 3, *drafts[:position]], mask)
        np.testing.assert_allclose(got[position], expected, rtol=1e-5)
        context.extend(drafts[position : position + 1])
    assert got[0][8] == got[2][30] == got[1][1] == 0


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5, "presence_penalty": 0.5}]
)
def test_a_known_maximum_changes_nothing(options):
    logits = np.random.default_rng(6).normal(0, 2, 40).astype(np.float32)
    params, context = SamplingParams(**options), SamplingContext([5, 6, 7])
    peak = float(logits.max())
    found = target_distribution(logits, params, context, peak=peak)
    assert (found == target_distribution(logits, params, context)).all()
    assert greedy_token(logits, params, context, peak=peak) == greedy_token(logits, params, context)
    assert log_probability(logits, 3, peak) == log_probability(logits, 3)
    for wrong in (math.nan, math.inf, -math.inf):
        for call in (target_distribution, greedy_token):
            with pytest.raises(DSparkError, match="finite"):
                call(logits, params, context, peak=wrong)
        with pytest.raises(DSparkError, match="finite"):
            log_probability(logits, 3, wrong)


def test_needs_logits():
    assert not needs_logits(SamplingParams())
    assert needs_logits(SamplingParams(temperature=0.1))
    assert needs_logits(SamplingParams(repetition_penalty=1.1))
    assert needs_logits(SamplingParams(), TokenMask(BadWords(((1, 2),))))
    mask = TokenMask(min_tokens=3, end_ids=(2,))
    assert [needs_logits(SamplingParams(), mask, length) for length in (0, 2, 3)] == [True, True, False]


UNIFORMS = (0.0, 5e-324, 1e-17, 0.5, 1 - 2**-30, math.nextafter(1, 0))


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e-300)), min_size=1, max_size=50),
    st.one_of(st.sampled_from(UNIFORMS), st.floats(0, 1, exclude_max=True)),
)
@example([0.0, 0.1, 0.0], math.nextafter(1, 0))
@example([0.0, 5e-324, 0.0], math.nextafter(1, 0))
@example([0.1] * 10 + [0.0], math.nextafter(1, 0))
def test_draw_never_returns_a_zero(weights, uniform):
    probabilities = np.array(weights)
    if probabilities.sum() == 0:
        with pytest.raises(DSparkError, match="finite positive sum, got a sum of 0"):
            draw(probabilities, uniform)
        return
    assert probabilities[draw(probabilities, uniform)] > 0


def test_draw_is_the_inverse_of_the_cumulated_distribution():
    probabilities = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    expected = {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, math.nextafter(1, 0): 4}
    assert {uniform: draw(probabilities, uniform) for uniform in expected} == expected
    assert {uniform: draw(probabilities * 0.01, uniform) for uniform in expected} == expected


@pytest.mark.parametrize("uniform", [-1e-9, 1.0, math.nan])
def test_draw_refuses_numbers_outside_its_range(uniform):
    with pytest.raises(DSparkError, match=r"expected a uniform number in \[0, 1\)"):
        draw(np.array([1.0]), uniform)


def test_draw_refuses_nan():
    with pytest.raises(DSparkError, match="got a sum of nan"):
        draw(np.array([0.5, math.nan]), 0.3)


def test_log_probability():
    generator = np.random.default_rng(2)
    logits = generator.normal(0, 4, (3, 500)).astype(np.float32)
    logits[1] += 300  # exp overflows unless the maximum is taken off first
    logits[2, 7] = -np.inf
    exact = logits.astype(np.float64)
    exact -= np.logaddexp.reduce(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(log_probability(logits, [4, 5, 7]), [exact[0, 4], exact[1, 5], -np.inf], atol=1e-5)
    np.testing.assert_allclose(log_probability(logits[1], [1, 2, 2, 9]), exact[1, [1, 2, 2, 9]], atol=1e-5)
    single = log_probability(logits[0], 11)
    assert np.shape(single) == () and single == pytest.approx(exact[0, 11], abs=1e-5)
    with pytest.raises(ValueError, match="one for each of 3 rows"):
        log_probability(logits, [1, 2])
