"""What the engine tells an observer about each round of speculation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RoundRecord:
    """One request's drafts of one step, and what became of them."""

    confidence_logits: NDArray[np.float32]
    """[m], of every draft of the block, as the drafter gave them: a copy, not a view of a buffer."""
    sampled: bool
    """Whether the request has a temperature above 0."""
    verified: int
    """Leading drafts that the target checked, up to one that ended the sequence: of others nothing is known."""
    accepted: int
    """How many of them stood."""
    request: int
    """A number that the rounds of one request share."""


RoundObserver: TypeAlias = Callable[[RoundRecord], None]
"""Called on the engine's thread: keep it short."""
