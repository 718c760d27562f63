"""From the target's answer to tokens of a sequence: drafts that stand, and the token that follows them.

Everything the target says about one position (masks, penalties, log-probability) is applied position by position, so
speculation changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_backend.acceptance import Proposal, accepts, residual
from dspark_backend.rng import Purpose
from dspark_backend.sampling import (
    draw,
    greedy_token,
    log_probability,
    masked_logits,
    needs_logits,
    target_distribution,
)
from dspark_backend.sequence import SequenceState
from dspark_backend.stages.batch import FloatArray, IntArray


@dataclass(frozen=True)
class VerifiedDrafts:
    """The drafts of one request that go into a verification step, with what each was drawn from."""

    tokens: tuple[int, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    """One a token; not read for greedy requests."""


NO_DRAFTS = VerifiedDrafts()


def take_tokens(
    sequence: SequenceState, drafts: VerifiedDrafts, logits: FloatArray, argmax: Sequence[int] | IntArray
) -> int:
    """Append what the target says to a sequence, until a draft falls, the drafts are used up or the sequence ends.

    ``logits`` [n + 1, V] and ``argmax`` [n + 1] are the target's at the anchor and at each of the n drafts. Returns how
    many drafts stand (and were appended).

    Raises:
        DSparkError: the logits are not finite, or masks leave no token.
    """
    request = sequence.prepared.request
    count = len(drafts.tokens)
    for place in range(count + 1):
        draft = drafts.tokens[place] if place < count else None
        proposal = drafts.proposals[place] if draft is not None and drafts.proposals else None
        token, stands = _choose(sequence, logits[place], int(argmax[place]), draft, proposal)
        log_prob = float(log_probability(logits[place], token)) if request.log_probs else None
        sequence.append(token, log_prob)
        if not stands:
            return place
        if sequence.finish_reason is not None:
            return place + 1
    raise AssertionError("the position behind the last draft never stands")


def _choose(
    sequence: SequenceState, logits: FloatArray, argmax: int, draft: int | None, proposal: Proposal | None
) -> tuple[int, bool]:
    """The token of one position, and whether it is the draft."""
    params, mask, context = sequence.prepared.request.sampling, sequence.prepared.mask, sequence.context
    if not needs_logits(params, mask, context.output_length):
        masked_logits(logits, params, context)  # for its check: argmax of NaN looks like a token
        return argmax, argmax == draft
    if params.greedy:
        token = greedy_token(logits, params, context, mask)
        return token, token == draft
    target = target_distribution(logits, params, context, mask)
    if draft is None:
        return draw(target, sequence.rng.uniform(Purpose.TARGET)), False
    if proposal is None:
        raise ValueError("a sampled request needs the proposal of each draft")
    if accepts(target, proposal, draft, sequence.rng.uniform(Purpose.ACCEPT)):
        return draft, True
    return draw(residual(target, proposal), sequence.rng.uniform(Purpose.RESIDUAL)), False
