"""What the engine asks of the two models, whatever runtime is behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dspark_backend.stages.artifact import DrafterArtifact, VerifierArtifact
from dspark_backend.stages.batch import RowMove, StepBatch, StepOutput
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch, DraftOutput


class VerifierStage(Protocol):
    """The target model with its key/value cache: ``num_slots`` slots of ``capacity`` positions.

    A step writes the rows of its tokens into the cache before it attends, so that a position may be computed again (a
    rejected draft is simply overwritten). Which rows are valid is the caller's business.
    """

    @property
    def artifact(self) -> VerifierArtifact:
        """What was exported."""

    @property
    def lazy_memory(self) -> bool:
        """Whether cache rows that were never written cost nothing to read: fresh host memory is one page of zeros."""

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        """Make a cache of this size; ``moves`` names the rows of the old one that survive, and where they go."""

    def copy_rows(self, move: RowMove) -> None:
        """Copy cached rows between slots."""

    def clear_rows(self, slot: int, first: int = 0) -> None:
        """Overwrite the rows of a slot from ``first`` on with zeros."""

    def step(self, batch: StepBatch) -> StepOutput:
        """Run the model over a batch. Positions must lie below the capacity."""

    def close(self) -> None:
        """Give back memory and device."""


class DrafterStage(Protocol):
    """The drafter with its own slot cache, of the same slots and capacity as the verifier's.

    A row of the cache holds the drafter's keys and values of a committed position. A block's rows are written behind
    them and count for that round alone.
    """

    @property
    def artifact(self) -> DrafterArtifact:
        """What was exported."""

    @property
    def lazy_memory(self) -> bool:
        """Whether cache rows that were never written cost nothing to read: fresh host memory is one page of zeros."""

    def allocate(self, num_slots: int, capacity: int, moves: Sequence[RowMove]) -> None:
        """As for the verifier; ``capacity`` must leave room for a block behind the last committed position."""

    def copy_rows(self, move: RowMove) -> None:
        """Copy cached rows between slots."""

    def clear_rows(self, slot: int, first: int = 0) -> None:
        """Overwrite the rows of a slot from ``first`` on with zeros."""

    def commit_context(self, context: ContextRows) -> None:
        """Put rows into the cache without drafting."""

    def draft(self, batch: DraftBatch) -> DraftOutput:
        """Commit the batch's context rows, then draft for each request as many tokens as it has uniforms."""

    def close(self) -> None:
        """Give back memory and device."""
