"""From the target's answer to tokens of a sequence: drafts that stand, and the token that follows them.

Everything the target says about one position (masks, penalties, log-probability) is applied position by position, so
speculation changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dspark_backend.acceptance import Proposal, accepts, residual
from dspark_backend.penalties import SamplingContext
from dspark_backend.preparation import PreparedRequest
from dspark_backend.ranked import Head, head_of, ranking_temperature
from dspark_backend.rng import Purpose
from dspark_backend.sampling import (
    Probabilities,
    check_peak,
    draw,
    greedy_token,
    log_probability,
    needs_logits,
    target_distribution,
)
from dspark_backend.sequence import SequenceState
from dspark_backend.stages.batch import RankedRows
from dspark_backend.stages.rows import Rows


@dataclass(frozen=True)
class VerifiedDrafts:
    """The drafts of one request that go into a verification step, with what each was drawn from."""

    tokens: tuple[int, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    """One a token; not read for greedy requests."""


NO_DRAFTS = VerifiedDrafts()


@dataclass(frozen=True)
class TargetRows:
    """What the target says at the anchor of one request and at each of its n drafts.

    Greedy requests read numbers alone: nothing here of vocabulary size is touched for them.
    """

    logits: Rows
    """[n + 1, V]"""
    argmax: Sequence[int]
    """[n + 1]: the first index of the largest logit."""
    top_logit: Sequence[float]
    """[n + 1]: that logit; NaN where any of the row is."""
    ranked: RankedRows | None = None
    """The most probable tokens of all rows, where a stage gave them: most draws then read no row."""


def take_tokens(sequence: SequenceState, drafts: VerifiedDrafts, target: TargetRows) -> int:
    """Append what the target says to a sequence, until a draft falls, the drafts are used up or the sequence ends.

    ``target`` is its answer at the anchor and at each of the n drafts. Returns how many drafts stand (and were
    appended).

    Raises:
        DSparkError: the logits are not finite, or masks leave no token.
    """
    log_probs = sequence.prepared.request.log_probs
    count = len(drafts.tokens)
    for place in range(count + 1):
        draft = drafts.tokens[place] if place < count else None
        proposal = drafts.proposals[place] if draft is not None and drafts.proposals else None
        peak = check_peak(target.top_logit[place])
        token, stands = _choose(sequence, target, place, draft, proposal)
        log_prob = float(log_probability(target.logits[place], token, peak)) if log_probs else None
        sequence.append(token, log_prob)
        if not stands:
            return place
        if sequence.finish_reason is not None:
            return place + 1
    raise AssertionError("the position behind the last draft never stands")


def _choose(
    sequence: SequenceState, target: TargetRows, place: int, draft: int | None, proposal: Proposal | None
) -> tuple[int, bool]:
    """The token of one position, and whether it is the draft."""
    params, mask, context = sequence.prepared.request.sampling, sequence.prepared.mask, sequence.context
    if not needs_logits(params, mask, context.output_length):
        token = target.argmax[place]
        return token, token == draft
    if params.greedy:
        token = greedy_token(target.logits[place], params, context, mask, target.top_logit[place])
        return token, token == draft
    wanted = _Distribution(target, place, sequence.prepared, context)
    if draft is None:
        return wanted.draw(sequence.rng.uniform(Purpose.TARGET)), False
    if proposal is None:
        raise ValueError("a sampled request needs the proposal of each draft")
    if wanted.accepts(proposal, draft, sequence.rng.uniform(Purpose.ACCEPT)):
        return draft, True
    return wanted.draw(sequence.rng.uniform(Purpose.RESIDUAL), proposal), False


@dataclass(frozen=True)
class _Distribution:
    """What a sampled request draws from at one place: by the head of the ranking where that decides, else by the row.

    Both give the same answer to the same number, so that it does not matter who is asked.
    """

    target: TargetRows
    place: int
    prepared: PreparedRequest
    context: SamplingContext

    @cached_property
    def row(self) -> Probabilities:
        """float64 [V]; on a device this fetches the row."""
        logits, peak = self.target.logits[self.place], self.target.top_logit[self.place]
        return target_distribution(logits, self.prepared.request.sampling, self.context, self.prepared.mask, peak)

    @cached_property
    def head(self) -> Head | None:
        ranked, request = self.target.ranked, self.prepared.request
        if ranked is None or not ranking_temperature(request):
            return None
        if self.prepared.mask.banned(self.context.output_ids).size:
            return None
        return head_of(ranked, self.place, request.sampling)

    def accepts(self, proposal: Proposal, token: int, uniform: float) -> bool:
        stands = self.head.accepts(proposal, token, uniform) if self.head is not None else None
        return accepts(self.row, proposal, token, uniform) if stands is None else stands

    def draw(self, uniform: float, proposal: Proposal | None = None) -> int:
        """From p, or from max(p - q, 0)."""
        head = self.head
        if head is not None:
            token = head.draw(uniform, proposal)
            if token is not None:
                return token
        weights = self.row if proposal is None else residual(self.row, proposal)
        return draw(weights, uniform) if head is None else head.place(weights, uniform)
