"""Sequential temperature scaling: fits that are known, files that are wrong, numbers that must stay probabilities."""

from __future__ import annotations

import json
import logging
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dspark_backend.calibration import (
    BIASES,
    BINS,
    CALIBRATION_FILE,
    GRID,
    MIN_ROUNDS,
    Calibration,
    OnlineCalibration,
    Scaling,
    auc,
    expected_calibration_error,
    fit,
    load_calibration,
    reliability,
    sigmoid,
)
from dspark_backend.errors import ArtifactError

HASH = "0123456789abcdef" * 4


def rounds(true_temperatures, count, seed=0, biases=0.0):
    """Logits whose true conditional acceptance is sigmoid(z / T + b), and how many drafts stood: [N, g], [N]."""
    random = np.random.default_rng(seed)
    temperatures = np.asarray(true_temperatures, dtype=np.float64)
    logits = random.normal(1.0, 2.5, (count, len(temperatures))).astype(np.float32)
    stands = random.random(logits.shape) < sigmoid(logits / temperatures + biases)
    return logits, np.cumprod(stands, axis=1).sum(axis=1)


def position_errors(calibration, logits, accepted, sampled=False):
    survival = calibration.survival(logits, np.full(len(logits), sampled))
    return np.array(
        [expected_calibration_error(survival[:, k], accepted > k, BINS) for k in range(calibration.block_size)]
    )


def test_known_temperatures_are_recovered():
    true = (2.0, 0.5, 1.0, 4.0)
    logits, accepted = rounds(true, 60_000)
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
    logits, accepted = rounds(true, 40_000, biases=biases)
    result = fit(logits, accepted, np.full(len(logits), 3)).scaling
    np.testing.assert_allclose(result.biases, biases, atol=0.25)
    np.testing.assert_allclose(np.log(result.temperatures), np.log(true), atol=0.35)
    fresh, stood = rounds(true, 20_000, seed=1, biases=biases)
    after = position_errors(Calibration(result, Scaling.identity(3)), fresh, stood)
    assert (after < 0.015).all()
    plain = [
        position_errors(Calibration(Scaling((temperature,) * 3), Scaling.identity(3)), fresh, stood)[0]
        for temperature in GRID
    ]
    assert min(plain) > 0.05


def test_calibration_lowers_the_error_on_rounds_it_has_not_seen():
    true = (3.0, 3.0, 2.5, 2.0, 2.0)
    logits, accepted = rounds(true, 20_000)
    result = fit(logits, accepted, np.full(len(logits), 5))
    before = Calibration.identity(5)
    after = Calibration(result.scaling, Scaling.identity(5))
    fresh_logits, fresh_accepted = rounds(true, 20_000, seed=1)
    errors_before = position_errors(before, fresh_logits, fresh_accepted)
    errors_after = position_errors(after, fresh_logits, fresh_accepted)
    assert (errors_before > 0.05).all()
    assert (errors_after < 0.015).all()
    # The other regime's table was left alone.
    np.testing.assert_array_equal(position_errors(after, fresh_logits, fresh_accepted, sampled=True), errors_before)


def test_rounds_that_did_not_verify_a_position_do_not_count_for_it():
    true = (2.0, 2.0, 2.0)
    logits, accepted = rounds(true, 30_000)
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
    logits, accepted = rounds((3.0, 3.0), 10 * MIN_ROUNDS)
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


def test_the_identity_multiplies_plain_sigmoids_and_regimes_go_by_row():
    logits = np.array([[0.0, 2.0, -1.0], [0.0, 2.0, -1.0]], np.float32)
    plain = np.cumprod(1 / (1 + np.exp(-logits[0].astype(np.float64))))
    survival = Calibration.identity(3).survival(logits, np.array([False, True]))
    assert survival.dtype == np.float64
    np.testing.assert_allclose(survival, [plain, plain], rtol=1e-15)
    other = Scaling((2.0, 2.0, 2.0), (0.5, 0.0, -1.0))
    two = Calibration(Scaling.identity(3), other).survival(logits, np.array([False, True]))
    np.testing.assert_allclose(two[0], plain, rtol=1e-15)
    scaled = logits[1].astype(np.float64) / 2 + np.array(other.biases)
    np.testing.assert_allclose(two[1], np.cumprod(1 / (1 + np.exp(-scaled))), rtol=1e-15)


@given(
    arrays.arrays(np.float32, (5, 6), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
    st.lists(st.sampled_from(GRID.tolist()), min_size=6, max_size=6),
    st.lists(st.sampled_from(BIASES.tolist()), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_survival_is_a_falling_probability_whatever_comes(logits, temperatures, biases, sampled):
    one = Scaling(tuple(temperatures), tuple(biases))
    calibration = Calibration(one, Scaling(one.temperatures[::-1], one.biases[::-1]))
    with np.errstate(all="raise", under="ignore"):
        survival = calibration.survival(logits, np.array(sampled))
    assert survival.shape == logits.shape
    assert (survival >= 0).all() and (survival <= 1).all()
    assert (np.diff(survival, axis=1) <= 0).all()
    assert (survival[np.isnan(logits)] < 1e-300).all()


def test_survival_of_a_thousand_requests_takes_well_under_a_millisecond():
    calibration = Calibration.identity(7)
    logits = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    sampled = np.arange(1000) % 2 == 0
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        calibration.survival(logits, sampled)
        times.append(time.perf_counter() - begin)
    assert min(times) < 5e-4


def test_temperatures_and_biases_must_be_numbers_and_equally_many():
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive finite temperatures"):
            Scaling((temperature,))
    with pytest.raises(ValueError, match="finite biases"):
        Scaling((1.0,), (math.nan,))
    with pytest.raises(ValueError, match="as many biases"):
        Scaling((1.0,), (0.0, 0.0))
    for greedy, sampled in (((1.0,), (1.0, 1.0)), ((), ())):
        with pytest.raises(ValueError, match="as many greedy"):
            Calibration(Scaling(greedy), Scaling(sampled))


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


def test_a_saved_calibration_comes_back(tmp_path):
    greedy, sampled = Scaling((0.5, 1.0), (0.1, -0.2)), Scaling((2.0, 3.5))
    calibration = Calibration(greedy, sampled, HASH, ("position 2: too few",))
    calibration.save(tmp_path / CALIBRATION_FILE)
    assert Calibration.load(tmp_path / CALIBRATION_FILE, 2, HASH) == calibration
    assert load_calibration(tmp_path, 2, HASH) == calibration


def test_without_a_file_the_identity_is_used_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dspark_backend.calibration"):
        assert load_calibration(tmp_path, 3, HASH) == Calibration.identity(3, HASH)
    assert "dspark-export calibrate" in caplog.text and str(tmp_path) in caplog.text


def table(temperatures, biases=None):
    return {"temperatures": list(temperatures), "biases": [0.0] * len(temperatures) if biases is None else list(biases)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "expected format_version 2, got 1"),
        ({"greedy": table((1.0,) * 3), "sampled": table((1.0,) * 3)}, "expected 2 temperatures"),
        ({"greedy": table((1.0,))}, "as many greedy"),
        ({"greedy": table((1.0, 0.0))}, "positive finite"),
        ({"greedy": table((1.0, "warm"))}, "warm"),
        ({"greedy": table((1.0, 1.0), (0.0,))}, "as many biases"),
        ({"sampled": None}, "expected an object with temperatures"),
        ({"greedy": ...}, "expected the key 'greedy'"),
        ({"greedy": {"temperatures": [1.0, 1.0]}}, "expected the key 'biases'"),
        ({"drafter_hash": "f" * 64}, "ffffffffffff"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / CALIBRATION_FILE
    Calibration.identity(2, HASH).save(path)
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ArtifactError, match=message) as caught:
        Calibration.load(path, 2, HASH)
    assert str(path) in str(caught.value) and "dspark-export calibrate" in str(caught.value)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    path = tmp_path / CALIBRATION_FILE
    with pytest.raises(ArtifactError, match="found no file"):
        Calibration.load(path, 2, HASH)
    for text, message in (("{", "expected JSON"), ("[]", "got 'list'")):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=message) as caught:
            Calibration.load(path, 2, HASH)
        assert str(path) in str(caught.value)


def test_online_error_follows_the_predictions():
    true = (8.0, 8.0, 8.0)
    logits, accepted = rounds(true, 8000)
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
