"""The error that a server reports of its own predictions."""

from __future__ import annotations

import numpy as np
import pytest
from confidences import observed_rounds

from dspark_backend.calibration import Calibration, Scaling
from dspark_backend.online_calibration import OnlineCalibration


def test_online_error_follows_the_predictions():
    true = (8.0, 8.0, 8.0)
    logits, accepted = observed_rounds(true, 8000)
    verified = np.arange(8000) % 4
    seen = np.minimum(accepted, verified)
    greedy = np.zeros(8000, dtype=bool)
    right = Calibration(Scaling(true), Scaling(true)).survival(logits, greedy)
    wrong = Calibration.identity(3).survival(logits, greedy)
    errors = []
    for survival in (right, wrong):
        online = OnlineCalibration(3, half_life=2000)
        assert online.error == 0.0 and np.isnan(online.errors).all()
        for start in range(0, 8000, 16):
            step = slice(start, start + 16)
            online.update(survival[step], verified[step], seen[step])
        errors.append(online.error)
        assert (online.errors >= 0).all()
    assert errors[0] < 0.02 < 0.05 < errors[1]


def test_online_error_forgets():
    online = OnlineCalibration(1, half_life=10)
    half, one, none = np.full((1, 1), 0.5), np.ones(1, int), np.zeros(1, int)
    for _ in range(20):
        online.update(half, one, one)
    assert online.error == pytest.approx(0.5)
    # A half-life of true 50 % then halves what the earlier ones weigh.
    for step in range(200):
        online.update(half, one, one if step % 2 else none)
    assert online.error < 0.05


def test_online_error_ignores_what_was_not_verified():
    online = OnlineCalibration(2)
    online.update(np.array([[1.0, 0.0], [1.0, 0.3]]), np.array([1, 0]), np.array([1, 0]))
    assert online.errors[0] == 0.0 and np.isnan(online.errors[1])
    assert online.error == 0.0
