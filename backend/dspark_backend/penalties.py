"""Penalties for tokens that were there before, and the context of a sequence that they read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark_backend.request import SamplingParams


class TokenTally:
    """Distinct tokens of a prompt and its output, with counts over the output; last in, first out.

    Tokens sit in the order of their first appearance, the prompt's before the output's, so that taking back the last
    token can only ever free the last place.
    """

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        prompt = np.unique(np.asarray(prompt_ids, dtype=np.intp))
        self._prompt_size = self._size = prompt.size
        capacity = max(64, 2 * (prompt.size + len(output_ids)))
        self._ids = np.zeros(capacity, dtype=np.intp)
        self._counts = np.zeros(capacity, dtype=np.int32)
        self._ids[: prompt.size] = prompt
        self._places: dict[int, int] = {token: place for place, token in enumerate(prompt.tolist())}
        for token in output_ids:
            self.add(token)

    @property
    def ids(self) -> NDArray[np.intp]:
        """Distinct token ids [n], the prompt's first: a view."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.int32]:
        """Occurrences in the output [n], 0 for tokens of the prompt alone: a view."""
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """Count one more output token: O(1), amortised."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self._size
            if place == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    def remove_last(self, token: int) -> None:
        """Take back the token added last: O(1)."""
        place = self._places[token]
        self._counts[place] -= 1
        if self._counts[place] == 0 and place >= self._prompt_size:
            del self._places[token]
            self._size -= 1


@dataclass
class SamplingContext:
    """The tokens of one sequence so far. Grows at the end, also for a trial, and can be rolled back.

    ``append`` and ``rollback`` cost O(1) a token. The tally that penalties need is made at their first use.
    """

    prompt_ids: Sequence[int]
    _output_ids: list[int] = field(default_factory=list)
    _tally: TokenTally | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def output_ids(self) -> Sequence[int]:
        """Generated tokens: a live view, changed by ``append`` and ``rollback`` only."""
        return self._output_ids

    @property
    def output_length(self) -> int:
        return len(self._output_ids)

    @property
    def tally(self) -> TokenTally:
        if self._tally is None:
            self._tally = TokenTally(self.prompt_ids, self._output_ids)
        return self._tally

    def append(self, token: int) -> None:
        self._output_ids.append(token)
        if self._tally is not None:
            self._tally.add(token)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.append(token)

    def rollback(self, output_length: int) -> None:
        """Drop the last tokens until ``output_length`` are left.

        Raises:
            ValueError: ``output_length`` is negative or more than there are.
        """
        if not 0 <= output_length <= len(self._output_ids):
            raise ValueError(f"output_length: expected 0 to {len(self._output_ids)}, got {output_length}")
        while len(self._output_ids) > output_length:
            token = self._output_ids.pop()
            if self._tally is not None:
                self._tally.remove_last(token)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Whatever is appended inside is dropped at the end, also after an error."""
        length = self.output_length
        try:
            yield
        finally:
            self.rollback(length)


def penalise(logits: NDArray[np.float32], params: SamplingParams, context: SamplingContext) -> None:
    """Apply repetition, presence and frequency penalties to float32 [V], in place."""
    tally = context.tally
    ids, counts = tally.ids, tally.counts
    values = logits[ids]
    if params.repetition_penalty != 1.0:
        factor = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / factor, values * factor)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        values -= np.float32(params.presence_penalty) * (counts > 0)
        values -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    logits[ids] = values
