"""Sequential temperature scaling: files that are wrong, numbers that must stay probabilities."""

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

from dspark_backend.calibration import CALIBRATION_FILE, Calibration, Scaling, load_calibration
from dspark_backend.calibration_fit import BIASES, GRID
from dspark_backend.errors import ArtifactError

HASH = "0123456789abcdef" * 4


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
