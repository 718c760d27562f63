"""What was drafted for one sequence in a round."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_backend.acceptance import Proposal
from dspark_backend.draft_state import Survival
from dspark_backend.round_plan import Block
from dspark_backend.stages.draft_batch import DraftOutput
from dspark_backend.verification import VerifiedDrafts


@dataclass(frozen=True)
class Draft:
    """A row of a drafting round: m tokens."""

    output: DraftOutput
    place: int
    """Which row."""

    def block(self, depth: int, survival: Survival, greedy: bool) -> Block:
        """The first ``depth`` tokens, to be verified."""
        output, place = self.output, self.place
        tokens = output.tokens[place]
        proposals: tuple[Proposal, ...] = ()
        if not greedy:
            proposals = tuple(
                Proposal(output.candidates[place, slot], output.probabilities[place, slot]) for slot in range(depth)
            )
        return Block(
            drafts=VerifiedDrafts(tuple(tokens[:depth].tolist()), proposals),
            drafted=len(tokens),
            survival=survival,
            confidence_logits=output.confidence_logits[place],
        )
