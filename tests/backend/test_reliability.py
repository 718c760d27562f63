"""Reliability diagrams, calibration errors and ranking against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.reliability import auc, expected_calibration_error, reliability


def test_reliability_rows_and_the_error_agree_with_a_loop():
    random = np.random.default_rng(3)
    predicted = np.append(random.random(997), [0.0, 1.0, 0.1])
    observed = random.random(1000) < predicted**2
    rows = reliability(predicted, observed, 10)
    expected, total = [], 0.0
    for index in range(10):
        last = index == 9
        inside = (predicted * 10 >= index) & ((predicted * 10 < index + 1) | last)
        expected.append((predicted[inside].mean(), observed[inside].mean(), inside.sum()))
        total += inside.sum() / 1000 * abs(predicted[inside].mean() - observed[inside].mean())
    np.testing.assert_allclose([(row.mean_predicted, row.observed_rate, row.count) for row in rows], expected)
    assert expected_calibration_error(predicted, observed, 10) == pytest.approx(total)
    assert sum(row.count for row in rows) == 1000


def test_errors_at_the_edges():
    nothing = np.zeros(0)
    assert math.isnan(expected_calibration_error(nothing, nothing > 0, 10))
    assert reliability(nothing, nothing > 0, 10) == []
    sure = np.ones(4)
    assert expected_calibration_error(sure, sure > 0, 10) == 0.0
    assert expected_calibration_error(sure, sure < 0, 10) == 1.0
    assert [row.count for row in reliability(np.array([0.05, 0.95]), np.array([False, True]), 10)] == [1, 1]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_auc_is_the_share_of_ordered_pairs(cases):
    score = np.array([case[0] for case in cases], dtype=np.float64)
    observed = np.array([case[1] for case in cases], dtype=bool)
    pairs = [1.0 if high > low else 0.5 if high == low else 0.0 for high in score[observed] for low in score[~observed]]
    if pairs:
        assert auc(score, observed) == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(auc(score, observed))
