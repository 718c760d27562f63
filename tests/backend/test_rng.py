"""Seeds mean the same numbers for ever, and streams share none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dspark_backend.rng import Purpose, RngStreams

COUNT = 100_000


def test_a_seed_and_an_index_fix_every_stream():
    one, other = RngStreams(42, 3), RngStreams(42, 3)
    for purpose in reversed(Purpose):  # the order of first use must not matter
        other.uniform(purpose)
    for purpose in Purpose:
        first = one.uniforms(purpose, 11)
        again = RngStreams(42, 3).uniforms(purpose, 11)
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(first[1:], other.uniforms(purpose, 10))


def test_one_by_one_equals_in_bulk():
    streams = RngStreams(7)
    singles = [streams.uniform(Purpose.ACCEPT) for _ in range(6)]
    np.testing.assert_array_equal(singles, RngStreams(7).uniforms(Purpose.ACCEPT, 6))
    mixed = RngStreams(7)
    parts = [mixed.uniforms(Purpose.ACCEPT, 2), mixed.uniforms(Purpose.ACCEPT, 3, np.float32)]
    np.testing.assert_allclose(np.concatenate(parts), singles[:5], atol=2**-24)


def test_numbers_of_a_seed_are_pinned():
    """What a client got for a seed yesterday it gets today."""
    got = [RngStreams(1234, 1).uniform(purpose) for purpose in Purpose]
    assert got == [0.8959986470539755, 0.11109008941717624, 0.7600469136653175, 0.12299707954706862]


def test_streams_are_independent():
    """Correlations of all pairs over seeds, indices and purposes, also shifted by one; 5.5 sigma over 500 pairs."""
    streams = [
        RngStreams(seed, index).uniforms(purpose, COUNT)
        for seed in (0, 1, 2**64 - 1)
        for index in (0, 1)
        for purpose in Purpose
    ]
    bound = 5.5 / np.sqrt(COUNT)
    for one, other in itertools.combinations(streams, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < bound
        assert abs(np.corrcoef(one[1:], other[:-1])[0, 1]) < bound
    # Negative control: the same test finds a stream that is shared in part.
    shared = np.where(np.arange(COUNT) % 20 == 0, streams[0], streams[1])
    assert abs(np.corrcoef(shared, streams[0])[0, 1]) > bound


def test_float32_numbers_stay_below_one():
    class Highest(np.random.Generator):
        def random(self, size=None):
            return np.full(size, np.nextafter(1, 0))

    streams = RngStreams(0)
    streams._generators[Purpose.DRAFT] = Highest(np.random.PCG64(0))
    numbers = streams.uniforms(Purpose.DRAFT, 3, np.float32)
    assert numbers.dtype == np.float32
    assert np.all(numbers < 1)
    assert np.float32(np.nextafter(1, 0)) == 1.0, "the hazard this guards against"


def test_no_seed_draws_one_and_tells_it():
    one, other = RngStreams(None), RngStreams(None)
    assert one.seed != other.seed
    assert one.uniform(Purpose.TARGET) == RngStreams(one.seed).uniform(Purpose.TARGET)


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
def test_any_unsigned_64_bit_seed(seed):
    assert 0 <= RngStreams(seed, 63).uniform(Purpose.RESIDUAL) < 1
