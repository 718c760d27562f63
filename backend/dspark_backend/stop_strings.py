"""Stop strings: where a text ends, and what of it is safe to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Fed(NamedTuple):
    """What came of one piece of text."""

    text: str
    """Safe to send: no part of it belongs to a stop string, now or later."""
    stopped: bool
    consumed: int
    """Characters of the fed piece up to the end of the match; all of them without one."""
    matched: str | None = None
    """The stop string that was found."""


@dataclass(frozen=True)
class _Pattern:
    """A stop string; ``failure[n]`` is the length of the longest proper border of its first n characters."""

    text: str
    failure: tuple[int, ...]


@lru_cache(maxsize=512)
def _compile(text: str) -> _Pattern:
    failure = [0, 0]
    border = 0
    for char in text[1:]:
        while border and text[border] != char:
            border = failure[border]
        border += text[border] == char
        failure.append(border)
    return _Pattern(text, tuple(failure))


class StopStrings:
    """Finds the first stop string in text that comes in pieces; the result does not depend on how it is cut.

    The match that **ends** first wins; of several that end at the same character, the longest. So "ab" always beats
    "abc", and nothing waits for a longer string that may never come.

    Text fed with ``armed=False`` (before ``min_tokens``) cannot complete a match; one may begin in it, if it ends in
    armed text, as in vLLM. Text is held back only while it is the beginning of some stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: non-empty strings (the request checks them); none at all passes everything through."""
        self._patterns = [_compile(stop) for stop in dict.fromkeys(stops)]
        self._states = [0] * len(self._patterns)
        self._held = ""
        self._stopped = False

    @property
    def held(self) -> str:
        """The text held back."""
        return self._held

    def feed(self, text: str, armed: bool = True) -> Fed:
        """Take the next piece of text. After a match nothing is taken any more."""
        if self._stopped:
            return Fed("", True, 0)
        end, matched = len(text) + 1, ""
        for index, pattern in enumerate(self._patterns):
            found = self._advance(index, text[:end], armed)
            if found and (found < end or (found == end and len(pattern.text) > len(matched))):
                end, matched = found, pattern.text
        seen = self._held + text
        if matched:
            cut = len(self._held) + end - len(matched)
            self._held, self._stopped = "", True
            return Fed(seen[:cut], True, end, matched)
        keep = len(seen) - max(self._states, default=0)
        self._held = seen[keep:]
        return Fed(seen[:keep], False, len(text))

    def flush(self) -> str:
        """The text held back, once no more comes."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._patterns)
        return held

    def _advance(self, index: int, text: str, armed: bool) -> int:
        """Run one pattern over ``text`` (Knuth-Morris-Pratt); characters up to the end of its first match, or 0."""
        stop, failure = self._patterns[index].text, self._patterns[index].failure
        state, at = self._states[index], 0
        while at < len(text):
            if state == 0:
                at = text.find(stop[0], at)
                if at < 0:
                    break
            char = text[at]
            while state and stop[state] != char:
                state = failure[state]
            state += stop[state] == char
            at += 1
            if state == len(stop):
                if armed:
                    return at
                state = failure[state]
        self._states[index] = state
        return 0
