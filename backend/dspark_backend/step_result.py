"""What a step of the verifier gave, segment by segment."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dspark_backend.stages.batch import StepBatch, StepOutput
from dspark_backend.stages.rows import Rows
from dspark_backend.verification import TargetRows


@dataclass(frozen=True)
class StepResult:
    """A step of the verifier that went well."""

    num_tokens: int
    seconds: float
    features: list[Rows]
    """[n, F] of each segment's tokens: views of what the next step overwrites."""
    targets: list[TargetRows]
    """What the model says in each segment where that was asked."""
    finite: bool
    """Whether all logits that were asked for are."""

    @classmethod
    def of(cls, batch: StepBatch, output: StepOutput, seconds: float) -> StepResult:
        """Cut the output into its segments."""
        # Plain numbers: reading an array's elements one by one costs more than all of them at once.
        argmax, top_logit = output.argmax.tolist(), output.top_logit.tolist()
        first = itertools.pairwise(batch.offsets.tolist())
        wanted = itertools.pairwise(batch.logit_offsets.tolist())
        return cls(
            batch.num_tokens,
            seconds,
            [output.features[start:end] for start, end in first],
            [
                TargetRows(
                    output.logits[start:end],
                    argmax[start:end],
                    top_logit[start:end],
                    None if output.ranked is None else output.ranked[start:end],
                )
                for start, end in wanted
            ],
            bool(np.isfinite(output.top_logit).all()),
        )

    @cached_property
    def sound(self) -> list[int]:
        """How many tokens of each segment, of those whose logits were asked for, come before one that has a NaN or an
        infinity among them."""
        if self.finite:
            return [len(target.argmax) for target in self.targets]
        return [
            next((place for place, peak in enumerate(target.top_logit) if not math.isfinite(peak)), len(target.argmax))
            for target in self.targets
        ]
