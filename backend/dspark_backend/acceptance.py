"""The lossless rule of speculative decoding: which drafts stand, and what follows them.

Leviathan et al. (2023), Chen et al. (2023); DESIGN, "Acceptance". For one position, p is the target's distribution
and q the one the draft was really drawn from: accept x with probability min(1, p(x)/q(x)); at the first rejection draw
from norm(max(p - q, 0)); if all drafts stand, draw one more from p. The output is then distributed as p, whatever q is,
as long as the uniforms are independent of those that drew the drafts.

V is the vocabulary size, K the number of candidates that could have been drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.sampling import Probabilities

TokenArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Proposal:
    """The distribution a draft was drawn from, by its support."""

    candidates: TokenArray
    """[K]: different token ids."""
    probabilities: FloatArray
    """[K]: q of each candidate, summing to 1; every token that is not a candidate has q = 0."""

    def of(self, token: int) -> float:
        """q(token)"""
        return float(self.probabilities[self.candidates == token].sum())


def accepts(target: Probabilities, proposal: Proposal, token: int, uniform: float) -> bool:
    """Whether a draft stands: true with probability min(1, p(token) / q(token)).

    ``target`` is float64 [V]; ``uniform`` in [0, 1) comes from a stream of its own.
    """
    return bool(uniform * proposal.of(token) < target[token])


def residual(target: Probabilities, proposal: Proposal) -> Probabilities:
    """Unnormalised max(p - q, 0), float64 [V]: what to draw from after a rejection; p where that has no mass."""
    weights = target.copy()
    weights[proposal.candidates] = np.maximum(weights[proposal.candidates] - proposal.probabilities, 0.0)
    # Rounding may leave nothing of the difference where p and q are all but equal.
    return weights if weights.sum() > 0.0 else target
