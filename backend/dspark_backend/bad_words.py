"""Tokens that may not come next: bad words, and the end of the sequence before ``min_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import InvalidRequest

TokenIds: TypeAlias = NDArray[np.intp]

_NOTHING: TokenIds = np.empty(0, dtype=np.intp)


@dataclass(frozen=True)
class BadWords:
    """Token sequences that must never appear in the output.

    A sequence of one token is always banned. Of a longer one the last token is banned whenever the output ends with all
    the tokens before it. Only the output counts: a prompt that ends inside a bad word bans nothing.

    Raises:
        InvalidRequest: a sequence is empty.
    """

    sequences: tuple[tuple[int, ...], ...] = ()
    _always: TokenIds = field(init=False, repr=False, compare=False)
    _after: dict[int, list[tuple[tuple[int, ...], int]]] = field(init=False, repr=False, compare=False)
    """Last token of a head -> (head, token banned after it): most tokens start no bad word, so a look-up is O(1)."""

    def __post_init__(self) -> None:
        always: set[int] = set()
        after: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for sequence in dict.fromkeys(tuple(sequence) for sequence in self.sequences):
            if not sequence:
                raise InvalidRequest("bad_words: expected at least one token in every entry, got an entry without any")
            *head, last = sequence
            if head:
                after.setdefault(head[-1], []).append((tuple(head), last))
            else:
                always.add(last)
        object.__setattr__(self, "_always", np.array(sorted(always), dtype=np.intp))
        object.__setattr__(self, "_after", after)

    def __bool__(self) -> bool:
        return bool(self.sequences)

    def banned(self, output_ids: Sequence[int]) -> TokenIds:
        """Token ids that may not follow ``output_ids``: int [n], possibly with repetitions."""
        heads = self._after.get(output_ids[-1]) if len(output_ids) else None
        if heads is None:
            return self._always
        last = [token for head, token in heads if tuple(output_ids[-len(head) :]) == head]
        return np.concatenate([self._always, np.array(last, dtype=np.intp)]) if last else self._always


@dataclass(frozen=True)
class TokenMask:
    """Everything that forbids tokens of one request outright. The default forbids nothing."""

    bad_words: BadWords = field(default_factory=BadWords)
    min_tokens: int = 0
    """``end_ids`` are forbidden while the output is shorter than this."""
    end_ids: tuple[int, ...] = ()
    """EOS and whatever other tokens end the sequence."""

    def may_ban(self, output_length: int) -> bool:
        """Whether any token can be banned at this output length or a later one."""
        return bool(self.bad_words) or (output_length < self.min_tokens and bool(self.end_ids))

    def banned(self, output_ids: Sequence[int]) -> TokenIds:
        """Token ids that may not follow ``output_ids``: int [n], possibly with repetitions."""
        banned = self.bad_words.banned(output_ids) if self.bad_words else _NOTHING
        if self.end_ids and len(output_ids) < self.min_tokens:
            return np.concatenate([banned, np.array(self.end_ids, dtype=np.intp)])
        return banned
