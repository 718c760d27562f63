"""Draws follow the distribution they are drawn from: chi-square, with negative controls that must fail."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from dspark_backend.bad_words import BadWords, TokenMask
from dspark_backend.penalties import SamplingContext
from dspark_backend.request import SamplingParams
from dspark_backend.rng import Purpose, RngStreams
from dspark_backend.sampling import draw, target_distribution

DRAWS = 120_000
REJECT = 1e-4
"""The seeds are fixed, so a test that passes once passes always; a wrong distribution gives far less."""
LOGITS = np.array([2.0, 1.5, 1.5, 0.3, -0.7, -1.0, -2.5, 0.9], dtype=np.float32)


def counts_of(probabilities: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    tokens = [draw(probabilities, uniform) for uniform in uniforms.tolist()]
    return np.bincount(tokens, minlength=probabilities.size)


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    if np.count_nonzero(possible) == 1:
        return 1.0
    return float(chisquare(counts[possible], counts.sum() * probabilities[possible]).pvalue)


def by_hand(weights: dict[int, float]) -> np.ndarray:
    expected = np.zeros(LOGITS.size)
    for token, weight in weights.items():
        expected[token] = weight
    return expected / expected.sum()


def exponentials(temperature: float, tokens, shift: dict[int, float] | None = None) -> dict[int, float]:
    shift = shift or {}
    return {token: float(np.exp((float(LOGITS[token]) + shift.get(token, 0.0)) / temperature)) for token in tokens}


EVERY = range(LOGITS.size)
SETTINGS = {
    "plain": (SamplingParams(temperature=1.0), TokenMask(), by_hand(exponentials(1.0, EVERY))),
    "hot": (SamplingParams(temperature=2.5), TokenMask(), by_hand(exponentials(2.5, EVERY))),
    "top_k with a tie": (SamplingParams(temperature=1.0, top_k=2), TokenMask(), by_hand(exponentials(1.0, [0, 1]))),
    # Shares: .39 .24 .24 .13 ... of the whole: three tokens hold .75.
    "top_p": (SamplingParams(temperature=1.0, top_p=0.7), TokenMask(), by_hand(exponentials(1.0, [0, 1, 2]))),
    # exp(-1.1) = .33 and exp(-1.7) = .18
    "min_p": (SamplingParams(temperature=1.0, min_p=0.3), TokenMask(), by_hand(exponentials(1.0, [0, 1, 2, 7]))),
    "mask": (
        SamplingParams(temperature=1.0),
        TokenMask(BadWords(((0,), (3, 2), (4, 1))), min_tokens=9, end_ids=(5,)),
        by_hand(exponentials(1.0, [1, 3, 4, 6, 7])),
    ),
    "penalties": (
        SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25),
        TokenMask(),
        by_hand(exponentials(1.0, EVERY, {0: -0.75, 3: -1.0})),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_distribution(name):
    params, mask, expected = SETTINGS[name]
    context = SamplingContext([1, 2])
    context.extend([3, 0, 3])
    probabilities = target_distribution(LOGITS, params, context, mask)
    counts = counts_of(probabilities, RngStreams(11, 4).uniforms(Purpose.TARGET, DRAWS))
    assert p_value(counts, expected) > REJECT
    for other, (_, _, wrong) in SETTINGS.items():
        if other != name:
            assert p_value(counts, wrong) < REJECT, f"control: draws of {name} pass as {other}"


def test_control_a_temperature_off_by_two_percent_is_found():
    probabilities = target_distribution(LOGITS, SamplingParams(temperature=1.02), SamplingContext([]))
    counts = counts_of(probabilities, RngStreams(11).uniforms(Purpose.TARGET, DRAWS))
    assert p_value(counts, by_hand(exponentials(1.0, EVERY))) < REJECT


def test_control_an_off_by_one_in_the_inverse_is_found():
    """searchsorted on the other side of a coarse grid of uniforms: what a wrong `side` would do."""
    probabilities = np.array([0.25, 0.25, 0.25, 0.25])
    uniforms = np.floor(RngStreams(11).uniforms(Purpose.TARGET, DRAWS) * 16) / 16
    assert p_value(counts_of(probabilities, uniforms), probabilities) > REJECT
    wrong = np.bincount(np.cumsum(probabilities).searchsorted(uniforms, side="left"), minlength=4)
    assert p_value(wrong, probabilities) < REJECT


def test_residual_weights_need_no_normalisation():
    weights = np.maximum(np.array([0.5, 0.1, 0.4]) - np.array([0.2, 0.6, 0.2]), 0)
    counts = counts_of(weights, RngStreams(3).uniforms(Purpose.RESIDUAL, DRAWS))
    assert p_value(counts, np.array([0.6, 0.0, 0.4])) > REJECT


@pytest.mark.parametrize("purpose", list(Purpose))
def test_streams_are_uniform_within_and_across_sequences(purpose):
    along = RngStreams(5).uniforms(purpose, DRAWS)
    across = np.array([RngStreams(5, index).uniform(purpose) for index in range(3000)])
    over_seeds = np.array([RngStreams(seed).uniform(purpose) for seed in range(3000)])
    for numbers in (along, across, over_seeds):
        assert kstest(numbers, "uniform").pvalue > REJECT
    assert kstest(along**1.05, "uniform").pvalue < REJECT  # control


def test_two_purposes_give_independent_draws():
    """Contingency table of (draft, target) draws of one sequence; the control shares one stream, as a bug would."""
    probabilities = target_distribution(LOGITS, SamplingParams(temperature=1.0), SamplingContext([]))
    streams = RngStreams(8)
    drafts, targets = (streams.uniforms(purpose, DRAWS) for purpose in (Purpose.DRAFT, Purpose.TARGET))
    joint = np.outer(probabilities, probabilities)

    def table(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        cells = np.zeros_like(joint)
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            cells[draw(probabilities, one), draw(probabilities, other)] += 1
        return cells

    assert chisquare(table(drafts, targets).ravel(), DRAWS * joint.ravel()).pvalue > REJECT
    assert chisquare(table(drafts[:5000], drafts[:5000]).ravel(), 5000 * joint.ravel()).pvalue < REJECT
