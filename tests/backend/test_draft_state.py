"""Survival curves of blocks that ended early."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dspark_backend.draft_state import extended

CURVE = st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5).map(lambda row: np.cumprod(np.round(row, 6)))


@given(st.lists(st.tuples(CURVE, CURVE), min_size=1, max_size=4), st.integers(1, 5))
def test_what_was_not_drafted_falls_as_it_did_before(rows, width):
    now, known = (np.array(column) for column in zip(*rows, strict=True))
    curves = extended(now[:, :width], known)
    np.testing.assert_array_equal(curves[:, :width], now[:, :width])
    assert curves.shape == known.shape
    assert (np.diff(curves, axis=1) <= 1e-12).all() and (curves >= 0).all()
    np.testing.assert_allclose(extended(known[:, :width], known), known, rtol=1e-9, atol=1e-12)


def test_a_single_curve():
    np.testing.assert_allclose(extended(np.array([0.9]), np.array([0.6, 0.3, 0.0])), [0.9, 0.45, 0.0])
    np.testing.assert_array_equal(extended(np.array([0.5]), np.zeros(3)), [0.5, 0.0, 0.0])
