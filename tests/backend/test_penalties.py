"""The context of a sequence: counts that follow appends and rollbacks exactly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.penalties import SamplingContext, penalise
from dspark_backend.request import SamplingParams

tokens = st.integers(0, 12)
steps = st.lists(st.one_of(tokens.map(lambda token: ("append", token)), st.integers(0, 6).map(lambda n: ("drop", n))))


@settings(deadline=None)
@given(st.lists(tokens), st.lists(tokens, max_size=5), steps)
def test_tally_follows_appends_and_rollbacks(prompt, start, actions):
    context = SamplingContext(prompt)
    context.extend(start)
    output = list(start)
    _ = context.tally
    for name, value in actions:
        if name == "append":
            context.append(value)
            output.append(value)
        else:
            keep = max(0, len(output) - value)
            context.rollback(keep)
            del output[keep:]
        assert list(context.output_ids) == output
        counts = dict(zip(context.tally.ids.tolist(), context.tally.counts.tolist(), strict=True))
        assert counts == {token: Counter(output)[token] for token in set(prompt) | set(output)}


def test_tally_grows_past_its_first_capacity():
    context = SamplingContext([1])
    _ = context.tally
    context.extend(range(1000))
    assert context.tally.ids.size == 1000
    assert set(context.tally.counts.tolist()) == {1}
    context.rollback(0)
    assert context.tally.ids.tolist() == [1] and context.tally.counts.tolist() == [0]


def test_a_trial_leaves_no_trace_even_after_an_error():
    context = SamplingContext([1, 2])
    context.extend([3, 1])
    before = (list(context.output_ids), context.tally.ids.tolist(), context.tally.counts.tolist())
    with pytest.raises(KeyError), context.trial():
        context.extend([3, 9, 9])
        raise KeyError
    assert (list(context.output_ids), context.tally.ids.tolist(), context.tally.counts.tolist()) == before


@pytest.mark.parametrize("length", [-1, 3])
def test_rollback_refuses_lengths_that_never_were(length):
    context = SamplingContext([])
    context.extend([4, 5])
    with pytest.raises(ValueError, match="expected 0 to 2"):
        context.rollback(length)


def test_penalties_by_hand():
    context = SamplingContext([0, 1])
    context.extend([1, 2, 2])
    logits = np.array([4.0, -4.0, 1.0, 7.0], dtype=np.float32)
    penalise(logits, SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), context)
    # 0: prompt only; 1: prompt and once in the output; 2: twice in the output; 3: nowhere.
    np.testing.assert_array_equal(logits, [2.0, -8.0 - 0.5 - 0.25, 0.5 - 0.5 - 0.5, 7.0])
