"""Bad words and the minimum length: which tokens may not come next."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.bad_words import BadWords, TokenMask
from dspark_backend.errors import InvalidRequest

tokens = st.integers(0, 3)


@settings(deadline=None)
@given(st.lists(st.lists(tokens, min_size=1, max_size=4).map(tuple), max_size=12), st.lists(tokens, max_size=10))
def test_banned_are_exactly_the_tokens_that_complete_a_word(sequences, output):
    banned = set(BadWords(tuple(sequences)).banned(output).tolist())
    completing = {token for token in range(4) for s in sequences if tuple([*output, token][-len(s) :]) == s}
    assert banned == completing


def test_output_shorter_than_the_head_bans_nothing():
    words = BadWords(((1, 1, 2),))
    assert words.banned([]).size == words.banned([1]).size == 0
    assert words.banned([1, 1]).tolist() == [2]


def test_no_words():
    assert not BadWords()
    assert BadWords().banned([1, 2]).size == 0


def test_an_empty_sequence_is_refused():
    with pytest.raises(InvalidRequest, match="bad_words: expected at least one token in every entry"):
        BadWords(((1,), ()))


def test_end_tokens_are_banned_until_min_tokens():
    mask = TokenMask(BadWords(((9,),)), min_tokens=2, end_ids=(0, 5))
    assert sorted(mask.banned([1]).tolist()) == [0, 5, 9]
    assert mask.banned([1, 1]).tolist() == [9]
    assert mask.may_ban(2)
    assert TokenMask().banned([1]).size == 0


def test_without_words_a_mask_is_over_at_min_tokens():
    mask = TokenMask(min_tokens=2, end_ids=(0,))
    assert [mask.may_ban(length) for length in range(4)] == [True, True, False, False]
    assert not TokenMask(min_tokens=2).may_ban(0)
