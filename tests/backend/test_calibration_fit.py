"""Fits that are known, and what they may not learn from."""

from __future__ import annotations

import numpy as np
import pytest
from confidences import observed_rounds

from dspark_backend.calibration import Calibration, Scaling
from dspark_backend.calibration_fit import BIASES, GRID, MIN_ROUNDS, fit
from dspark_backend.reliability import BINS, expected_calibration_error


def position_errors(calibration, logits, accepted, sampled=False):
    survival = calibration.survival(logits, np.full(len(logits), sampled))
    return np.array(
        [expected_calibration_error(survival[:, k], accepted > k, BINS) for k in range(calibration.block_size)]
    )


def test_known_temperatures_are_recovered():
    true = (2.0, 0.5, 1.0, 4.0)
    logits, accepted = observed_rounds(true, 60_000)
    result = fit(logits, accepted, np.full(len(logits), 4))
    assert result.notes == ()
    # One step of the grid is a factor of 1.12; the later positions see fewer rounds whose prefix still stands.
    found = result.scaling.temperatures
    np.testing.assert_allclose(np.log(found), np.log(true), atol=0.35)
    np.testing.assert_allclose(np.log(found[:2]), np.log(true[:2]), atol=0.15)
    np.testing.assert_allclose(result.scaling.biases, 0.0, atol=0.2)
    assert all(temperature in GRID for temperature in found) and all(bias in BIASES for bias in result.scaling.biases)


def test_known_biases_are_recovered_and_no_temperature_makes_up_for_them():
    true, biases = (1.0, 0.6, 1.0), np.array([-0.8, 0.6, -1.2])
    logits, accepted = observed_rounds(true, 40_000, biases=biases)
    result = fit(logits, accepted, np.full(len(logits), 3)).scaling
    np.testing.assert_allclose(result.biases, biases, atol=0.25)
    np.testing.assert_allclose(np.log(result.temperatures), np.log(true), atol=0.35)
    fresh, stood = observed_rounds(true, 20_000, seed=1, biases=biases)
    after = position_errors(Calibration(result, Scaling.identity(3)), fresh, stood)
    assert (after < 0.015).all()
    plain = [
        position_errors(Calibration(Scaling((temperature,) * 3), Scaling.identity(3)), fresh, stood)[0]
        for temperature in GRID
    ]
    assert min(plain) > 0.05


def test_calibration_lowers_the_error_on_rounds_it_has_not_seen():
    true = (3.0, 3.0, 2.5, 2.0, 2.0)
    logits, accepted = observed_rounds(true, 20_000)
    result = fit(logits, accepted, np.full(len(logits), 5))
    before = Calibration.identity(5)
    after = Calibration(result.scaling, Scaling.identity(5))
    fresh_logits, fresh_accepted = observed_rounds(true, 20_000, seed=1)
    errors_before = position_errors(before, fresh_logits, fresh_accepted)
    errors_after = position_errors(after, fresh_logits, fresh_accepted)
    assert (errors_before > 0.05).all()
    assert (errors_after < 0.015).all()
    # The other regime's table was left alone.
    np.testing.assert_array_equal(position_errors(after, fresh_logits, fresh_accepted, sampled=True), errors_before)


def test_rounds_that_did_not_verify_a_position_do_not_count_for_it():
    true = (2.0, 2.0, 2.0)
    logits, accepted = observed_rounds(true, 30_000)
    shallow = np.arange(len(logits)) % 2 == 0
    depths = np.where(shallow, 1, 3)
    seen = np.minimum(accepted, depths)
    both = fit(logits, seen, depths)
    deep_only = fit(logits[~shallow], seen[~shallow], depths[~shallow])
    both, deep_only = both.scaling, deep_only.scaling
    assert both.temperatures[1:] == pytest.approx(deep_only.temperatures[1:], rel=0.13)
    assert both.biases[1:] == pytest.approx(deep_only.biases[1:], abs=0.11)
    # The negative control: taking the unverified ones for rejections makes the later drafts look hopeless.
    wrong = fit(logits, seen, np.full(len(logits), 3)).scaling
    assert wrong.biases[1] < both.biases[1] - 0.5


def test_too_few_rounds_leave_the_identity_with_a_note():
    logits, accepted = observed_rounds((3.0, 3.0), 10 * MIN_ROUNDS)
    depths = np.ones(len(logits), dtype=np.int64)
    depths[: MIN_ROUNDS - 1] = 2
    result = fit(logits, np.minimum(accepted, depths), depths)
    assert result.scaling.temperatures[0] > 1.5
    assert (result.scaling.temperatures[1], result.scaling.biases[1]) == (1.0, 0.0)
    (note,) = result.notes
    assert "position 2" in note and str(MIN_ROUNDS - 1) in note
    assert fit(np.zeros((0, 3), np.float32), np.zeros(0, int), np.zeros(0, int)).scaling == Scaling.identity(3)


def test_ties_take_the_temperature_closest_to_one():
    # Logits of 0 are the same at every temperature; the bias alone says that two of three stand, then one of two.
    logits = np.zeros((300, 2), np.float32)
    found = fit(logits, np.arange(300) % 3, np.full(300, 2)).scaling
    assert found.temperatures == (1.0, 1.0) and found.biases == (0.7, 0.0)


def test_fit_refuses_rounds_that_cannot_be():
    logits = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        fit(logits, np.zeros(3, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="more accepted than verified"):
        fit(logits, np.full(4, 2), np.full(4, 1))
