"""Stop strings: nothing leaks, nothing waits without need, and cuts do not matter."""

from __future__ import annotations

import time
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.stop_strings import Fed, StopStrings

CHARS = st.text("ab", max_size=40)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=5)


def expected(text: str, stops: list[str], armed_from: int = 0) -> tuple[str, str | None]:
    """By definition: the first end in armed text wins, then the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop) and end > armed_from]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def held(text: str, stops: list[str]) -> int:
    """By definition: the longest ending of the text that is a proper beginning of a stop string."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


def cut(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(at % (len(text) + 1) for at in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@settings(max_examples=1500, deadline=None)
@given(text=CHARS, stops=STOPS, cuts=st.lists(st.integers(0, 100), max_size=8), unarmed=st.integers(0, 4))
def test_against_the_definition(text: str, stops: list[str], cuts: list[int], unarmed: int) -> None:
    parts = cut(text, cuts)
    armed_from = sum(map(len, parts[:unarmed]))
    answer, stop = expected(text, stops, armed_from)
    matcher, out, consumed = StopStrings(stops), "", 0
    for index, part in enumerate(parts):
        fed = matcher.feed(part, armed=index >= unarmed)
        out += fed.text
        consumed += fed.consumed
        assert answer.startswith(out)
        if fed.stopped:
            assert fed.matched == stop
            assert text[:consumed] == answer + (stop or "")
            assert matcher.feed("more") == Fed("", True, 0)
            break
        assert len(matcher.held) == held(text[:consumed], stops)
    else:
        assert stop is None
        assert consumed == len(text)
    assert out + matcher.flush() == answer


def test_split_over_pieces() -> None:
    matcher = StopStrings(["\n\nUser:"])
    assert matcher.feed("Hello\n") == Fed("Hello", False, 6)
    assert matcher.feed("\nUse") == Fed("", False, 4)
    assert matcher.feed("r") == Fed("", False, 1)
    assert matcher.feed(": hi") == Fed("", True, 1, "\n\nUser:")
    assert matcher.flush() == ""


def test_false_alarm_is_released() -> None:
    matcher = StopStrings(["</s>"])
    assert matcher.feed("a<").text == "a"
    assert matcher.feed("/").text == ""
    assert matcher.feed("b<").text == "</b"
    assert matcher.flush() == "<"


def test_one_a_prefix_of_another() -> None:
    assert StopStrings(["abc", "ab"]).feed("xabc") == Fed("x", True, 3, "ab")


def test_one_inside_another() -> None:
    assert StopStrings(["bcd", "c"]).feed("abcd") == Fed("ab", True, 3, "c")


def test_same_end_the_longest_wins() -> None:
    assert StopStrings(["d", "bcd", "cd"]).feed("abcd!") == Fed("a", True, 4, "bcd")


def test_without_stop_strings() -> None:
    matcher = StopStrings([])
    assert matcher.feed("anything") == Fed("anything", False, 8)
    assert matcher.flush() == ""


def test_not_armed() -> None:
    matcher = StopStrings(["stop"])
    assert matcher.feed("a stop b", armed=False) == Fed("a stop b", False, 8)
    assert matcher.feed(" stop").stopped
    begun = StopStrings(["stop"])
    assert begun.feed("a st", armed=False).text == "a "
    assert begun.feed("op!") == Fed("", True, 2, "stop")


def test_64_long_stop_strings_that_nearly_match() -> None:
    """Every character advances every pattern: the worst case of what a request may ask."""
    stops = ["a" * 1000 + chr(0x100 + index) for index in range(64)]
    start = time.perf_counter()
    matcher = StopStrings(stops)
    assert "".join(matcher.feed("aaaa").text for _ in range(500)) == "a" * 1000
    assert matcher.feed("\u0100") == Fed("", True, 1, stops[0])
    assert time.perf_counter() - start < 2.0  # about 0.1 s
