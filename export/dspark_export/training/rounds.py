"""Which dialogues a run is trained on, and in which order: round after round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dspark_export.training.checkpoint import Position
from dspark_export.training.corpus import HELD_OUT, Corpus
from dspark_export.training.shard import Dialogue

Pair = tuple[int, int]
"""Shard, and row in it."""


class Rounds:
    """Rounds over the shards of a corpus that may grow.

    What is in one depends on the position and the seed alone, so that it can be resumed.
    """

    def __init__(
        self, corpus: Corpus, read: Callable[[int], list[Dialogue]], passes: int, seed: int
    ) -> None:  # fmt: skip
        """``read`` gives the dialogues of a shard, made now where they are missing."""
        self._corpus = corpus
        self._read = read
        self._passes = passes
        self._seed = seed
        self._mixed: tuple[int, list[Pair]] | None = None

    def next(self, position: Position) -> Position:
        """The start of a round: on all shards that are there. One more is made now where none is new, unless another
        process makes them: then the round is of old ones."""
        known = position.shards
        there = self._corpus.available - HELD_OUT - 1
        if there <= known and (not known or self._corpus.may_write()):
            there = known + 1
        self._read(HELD_OUT + there)
        return replace(position, offset=0, shards=there, fresh=there - known)

    def pairs(self, position: Position) -> list[Pair]:
        """New shards mixed with ``passes - 1`` times as many of all dialogues so far, in random order.

        Without new ones, as many of all as the last shard has.
        """
        if self._mixed is not None and self._mixed[0] == position.round:
            return self._mixed[1]
        random = np.random.default_rng([self._seed, 3, position.round])
        shards = [self.shard(HELD_OUT + 1 + index) for index in range(position.shards)]
        known = [pair for pairs in shards for pair in pairs]
        new = [pair for pairs in shards[position.shards - position.fresh :] for pair in pairs]
        count = (self._passes - 1) * len(new) if position.fresh else len(shards[-1])
        again = random.integers(len(known), size=count)
        mixed = [*new, *(known[index] for index in again)]
        mixed = [mixed[index] for index in random.permutation(len(mixed))]
        self._mixed = (position.round, mixed)
        return mixed

    def shard(self, index: int) -> list[Pair]:
        """All dialogues of a shard."""
        return [(index, row) for row in range(len(self._read(index)))]
