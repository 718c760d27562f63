"""What the engine asks of a verifier, whatever runtime is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dspark_backend.stages.artifact import VerifierArtifact
from dspark_backend.stages.batch import RowMove, StepBatch, StepOutput


class VerifierStage(Protocol):
    """The target model with its key/value cache: ``num_slots`` slots of ``capacity`` positions.

    A step writes the rows of its tokens into the cache before it attends, so that a position may be computed again (a
    rejected draft is simply overwritten). Which rows are valid is the caller's business.
    """

    @property
    def artifact(self) -> VerifierArtifact:
        """What was exported."""

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        """Make a cache of this size; ``moves`` names the rows of the old one that survive, and where they go."""

    def copy_rows(self, move: RowMove) -> None:
        """Copy cached rows between slots."""

    def step(self, batch: StepBatch) -> StepOutput:
        """Run the model over a batch. Positions must lie below the capacity."""

    def close(self) -> None:
        """Give back memory and device."""
