"""A small speculative decoder: the backend's own sampling, acceptance and scheduling over tables instead of models.

The target is a Markov chain over a few tokens, the drafter another one, and the confidence of a draft depends on the
tokens drafted before it, as a real drafter's does. V tokens, R sequences, blocks of g drafts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dspark_backend import verification
from dspark_backend.acceptance import Proposal
from dspark_backend.bad_words import TokenMask
from dspark_backend.penalties import SamplingContext
from dspark_backend.preparation import PreparedRequest
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_backend.rng import Purpose
from dspark_backend.sampling import target_distribution
from dspark_backend.scheduling import DepthPolicy, DraftRound, IntArray, Lagged
from dspark_backend.sequence import RequestState, SequenceState
from dspark_backend.verification import NO_DRAFTS, TargetRows, VerifiedDrafts, take_tokens

PLENTY = 1 << 30


def target_rows(logits: np.ndarray) -> TargetRows:
    """What the graph says of logits [n, V]."""
    return TargetRows(logits, logits.argmax(axis=1).tolist(), logits.max(axis=1).tolist())


class NoSink:
    """Implements Sink."""

    def delta(self, delta, last) -> None:
        raise AssertionError("nobody sends anything here")

    error = delta


def sequence_of(
    request: GenerationRequest, max_tokens: int = PLENTY, mask: TokenMask | None = None, tokenizer=None, index: int = 0
) -> SequenceState:
    """A sequence as the engine has it, for a request of token ids."""
    assert request.input_ids is not None
    prepared = PreparedRequest(request, request.input_ids, "", max_tokens, mask or TokenMask())
    return SequenceState(RequestState(prepared, NoSink(), 0), index, tokenizer)


@dataclass(frozen=True)
class Retrospective:
    """The best depths for the live confidences: what must not be done, as they depend on the drafts they judge."""

    drafts = True

    def depths(self, draft_round: DraftRound) -> IntArray:
        return Lagged().depths(replace(draft_round, lagged_survival=draft_round.survival))


@dataclass(frozen=True)
class Chains:
    """Target and drafter."""

    target: np.ndarray
    """float32 [V, V]: logits after each token."""
    draft: np.ndarray
    """float32 [V, V]"""
    confidence: np.ndarray
    """[V]: of a draft, by the token before it."""
    block: int = 3

    @property
    def size(self) -> int:
        return len(self.target)


def drafting_params(params: SamplingParams) -> SamplingParams:
    """What the drafter knows of them: no penalties."""
    return replace(params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)


def proposal(chains: Chains, params: SamplingParams, before: int) -> Proposal:
    """The drafter's distribution after a token, over its support alone."""
    weights = target_distribution(chains.draft[before], drafting_params(params), SamplingContext([]))
    support = np.flatnonzero(weights)
    return Proposal(support, weights[support])


def exact_pairs(chains: Chains, params: SamplingParams, anchor: int) -> np.ndarray:
    """The target's joint distribution of the next two tokens: [V, V]."""
    context = SamplingContext([anchor])
    pairs = np.zeros((chains.size, chains.size))
    first = target_distribution(chains.target[anchor], params, context)
    for token in range(chains.size):
        with context.trial():
            context.append(token)
            pairs[token] = first[token] * target_distribution(chains.target[token], params, context)
    return pairs


@dataclass
class Row:
    """One sequence of the batch."""

    params: SamplingParams
    anchor: int
    policy: DepthPolicy
    sequence: SequenceState
    recent: deque[np.ndarray]
    """Survival curves of the last two rounds, over the trials too: they are history."""

    @property
    def last(self) -> int:
        output = self.sequence.context.output_ids
        return output[-1] if output else self.anchor


@dataclass
class Decoder:
    """Decodes two tokens or more for every row, round by round, again and again.

    ``reported`` may name other parameters for the proposals than those that drafts are drawn with: a defect to find.
    """

    chains: Chains
    rows: list[Row]
    seconds: np.ndarray
    """[g * R + 1]"""
    reported: SamplingParams | None = None
    depths_seen: np.ndarray = field(init=False)
    """[R, g + 1]: rounds by depth, first rounds of a trial alone."""
    _proposals: dict[tuple[int, int], tuple[Proposal, list[float], Proposal]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.depths_seen = np.zeros((len(self.rows), self.chains.block + 1), dtype=np.int64)

    @classmethod
    def build(
        cls, chains: Chains, rows: Sequence[tuple[SamplingParams, int, DepthPolicy]], seconds: np.ndarray, **options
    ) -> Decoder:
        """``rows``: parameters (with a seed), anchor and policy of each sequence."""
        made = []
        for params, anchor, policy in rows:
            sequence = sequence_of(GenerationRequest(input_ids=(anchor,), sampling=params))
            prior = 0.5 ** np.arange(1, chains.block + 1)
            made.append(Row(params, anchor, policy, sequence, deque([prior, prior], maxlen=2)))
        return cls(chains, made, seconds, **options)

    def pairs(self, trials: int) -> Iterator[list[tuple[int, int]]]:
        """The first two tokens of every row, ``trials`` times."""
        for _ in range(trials):
            self.restart()
            open_rows = list(range(len(self.rows)))
            first = True
            while open_rows:
                self.round(open_rows, first)
                first = False
                open_rows = [row for row in open_rows if self.rows[row].sequence.context.output_length < 2]
            yield [tuple(row.sequence.context.output_ids[:2]) for row in self.rows]

    def counts(self, trials: int) -> np.ndarray:
        """How often each pair came: [R, V, V]."""
        cells = np.zeros((len(self.rows), self.chains.size, self.chains.size))
        for pairs in self.pairs(trials):
            for row, (one, two) in enumerate(pairs):
                cells[row, one, two] += 1
        return cells

    def restart(self) -> None:
        """Back to the anchors. The random streams go on."""
        for row in self.rows:
            row.sequence.context.rollback(0)
            row.sequence._pending.token_ids.clear()
            row.sequence._pending.text.clear()

    def round(self, open_rows: list[int], first: bool) -> None:
        """Draft, schedule, verify, accept."""
        rows, block = [self.rows[row] for row in open_rows], self.chains.block
        drafted = [self._draft(row) for row in rows]
        survival = np.cumprod(np.array([conditional for _, _, conditional in drafted]), axis=1)
        lagged = np.array([row.recent[0] for row in rows])
        limits = np.full(len(rows), block, dtype=np.int64)
        depths = rows[0].policy.depths(DraftRound(survival, lagged, limits, self.seconds, len(rows))).tolist()
        for place, row in enumerate(rows):
            tokens, proposals, _ = drafted[place]
            row.recent.append(survival[place])
            depth = depths[place]
            if first:
                self.depths_seen[open_rows[place], depth] += 1
            drafts = VerifiedDrafts(tokens[:depth], proposals[:depth]) if depth else NO_DRAFTS
            before = [row.last, *drafts.tokens]
            self.take(row, drafts, target_rows(self.chains.target[before]))

    def take(self, row: Row, drafts: VerifiedDrafts, target: TargetRows) -> None:
        take_tokens(row.sequence, drafts, target)

    def _draft(self, row: Row) -> tuple[tuple[int, ...], tuple[Proposal, ...], list[float]]:
        """Tokens, what is told of their distributions, and their confidences."""
        before, tokens, proposals, conditional = row.last, [], [], []
        for uniform in row.sequence.rng.uniforms(Purpose.DRAFT, self.chains.block).tolist():
            drawn, cumulated, told = self._proposal(row, before)
            conditional.append(float(self.chains.confidence[before]))
            before = int(drawn.candidates[min(bisect_right(cumulated, uniform), len(cumulated) - 1)])
            tokens.append(before)
            proposals.append(told)
        return tuple(tokens), tuple(proposals), conditional

    def _proposal(self, row: Row, before: int) -> tuple[Proposal, list[float], Proposal]:
        key = (id(row), before)
        if key not in self._proposals:
            drawn = proposal(self.chains, row.params, before)
            told = drawn if self.reported is None else proposal(self.chains, self.reported, before)
            self._proposals[key] = drawn, np.cumsum(drawn.probabilities).tolist(), told
        return self._proposals[key]


def remember_distributions(monkeypatch) -> None:
    """Let verification ask the real ``target_distribution`` once for each distinct input: ten times as many draws."""
    known: dict[tuple[object, ...], np.ndarray] = {}

    def remembered(logits, params, context, mask, peak):
        key = (id(params), logits.tobytes(), tuple(context.output_ids) if params.penalises else None)
        if key not in known:
            known[key] = target_distribution(logits, params, context, mask, peak)
            known[key].flags.writeable = False
        return known[key]

    monkeypatch.setattr(verification, "target_distribution", remembered)
