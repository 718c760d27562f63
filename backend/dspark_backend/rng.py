"""Random numbers of one sequence: independent streams by purpose, reproducible from a seed."""

from __future__ import annotations

import secrets
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Purpose(IntEnum):
    """What a random number decides. The values are part of what a seed means: never renumber them."""

    TARGET = 0
    """Tokens drawn from the target's own distribution (first token, bonus token, no speculation)."""
    DRAFT = 1
    """Tokens drawn by the drafter."""
    ACCEPT = 2
    """Whether a draft is accepted."""
    RESIDUAL = 3
    """The token that replaces a rejected draft."""


class RngStreams:
    """One generator for each purpose: a function of (seed, sequence index), not of what else is in the batch.

    Acceptance must not share a stream with drafting: a number that chose a token may not decide over it as well.
    ``seed`` is an unsigned 64-bit integer; None draws one from the operating system (and ``seed`` tells which).
    Each stream is consumed in order; ``uniform`` n times equals ``uniforms`` of n.
    """

    def __init__(self, seed: int | None, sequence_index: int = 0) -> None:
        self.seed = secrets.randbits(64) if seed is None else seed
        self.sequence_index = sequence_index
        self._generators: dict[Purpose, np.random.Generator] = {}

    def generator(self, purpose: Purpose) -> np.random.Generator:
        """The stream itself, made at its first use."""
        generator = self._generators.get(purpose)
        if generator is None:
            sequence = np.random.SeedSequence(self.seed, spawn_key=(self.sequence_index, int(purpose)))
            generator = self._generators[purpose] = np.random.Generator(np.random.PCG64(sequence))
        return generator

    def uniform(self, purpose: Purpose) -> float:
        """The next number in [0, 1)."""
        return self.generator(purpose).random()

    def uniforms(self, purpose: Purpose, count: int, dtype: DTypeLike = np.float64) -> NDArray[np.floating[Any]]:
        """The next ``count`` numbers in [0, 1), float64 or float32 [count]."""
        numbers: NDArray[np.floating[Any]] = self.generator(purpose).random(count)
        if np.dtype(dtype) == np.float32:
            # A plain cast rounds numbers just below 1 up to 1, which is outside the range.
            numbers = (np.floor(numbers * 2.0**24) * 2.0**-24).astype(np.float32)
        return numbers
