"""What a training run is doing, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark_export.training.checkpoint import Position
from dspark_export.training.heldout import HeldOutReport
from dspark_export.training.trainer import StepReport


@dataclass(frozen=True)
class Status:
    """What a run is doing, for whoever watches."""

    what: str
    done: float
    """Fraction of the whole run."""
    position: Position
    last: StepReport | None
    held_out: HeldOutReport | None

    @property
    def remaining_seconds(self) -> float:
        """nan while nothing can be said."""
        return self.position.seconds * (1 - self.done) / self.done if self.done > 0 else math.nan


@dataclass(frozen=True)
class RunReport:
    """How a sitting ended."""

    position: Position
    held_out: HeldOutReport
    finished: bool
    """The budget is used up; else the run was asked to stop and can be resumed."""
