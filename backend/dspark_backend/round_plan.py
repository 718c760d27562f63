"""What goes into one verification step, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_backend.draft_state import Survival
from dspark_backend.stages.batch import FloatArray
from dspark_backend.verification import NO_DRAFTS, VerifiedDrafts


@dataclass(frozen=True)
class Block:
    """What one sequence brings into a verification step."""

    drafts: VerifiedDrafts = NO_DRAFTS
    drafted: int = 0
    """Tokens the drafter proposed, verified or not."""
    survival: Survival | None = None
    """[g]: calibrated probability that drafts 1 .. k all stand, also of places beyond what was drafted."""
    confidence_logits: FloatArray | None = None
    """[m]: as the drafter gave them."""


@dataclass(frozen=True)
class Round:
    """The plan of one verification step."""

    blocks: list[Block]
    """One a sequence."""
    predicted_seconds: float
    """Of the verification step; 0 where no cost curve is known."""
    capacity: int = 0
    """Rows of a slot, as the prediction had it."""

    @property
    def depths(self) -> list[int]:
        """Drafts to verify, one a sequence."""
        return [len(block.drafts.tokens) for block in self.blocks]
