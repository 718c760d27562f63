"""Speculation is lossless, computed exactly: every draft, every depth and every way to accept, weighted and summed.

The batch's joint distribution over the next tokens of two requests must be the product of the target's, to rounding.
It has more power than any number of draws; test_losslessness.py draws, through the code that the engine calls.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from markov_speculation import Chains, Retrospective, exact_pairs, proposal

from dspark_backend.acceptance import Proposal, accepts, residual
from dspark_backend.penalties import SamplingContext
from dspark_backend.request import SamplingParams
from dspark_backend.sampling import target_distribution
from dspark_backend.scheduling import Causal, DepthPolicy, DraftRound, Fixed, Lagged, Off, Threshold

TOLERANCE = 1e-12
POLICIES = [Off(), Fixed(1), Fixed(2), Threshold(0.5), Causal(), Lagged()]
SETTINGS = {
    "cold": SamplingParams(temperature=0.5),
    "plain": SamplingParams(temperature=1.0),
    "hot": SamplingParams(temperature=1.5),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8),
    "top_k": SamplingParams(temperature=1.0, top_k=2),
    "min_p": SamplingParams(temperature=1.0, min_p=0.3),
    "repetition": SamplingParams(temperature=1.0, repetition_penalty=1.7),
    "presence, frequency": SamplingParams(temperature=1.0, presence_penalty=0.8, frequency_penalty=-0.3),
    "all": SamplingParams(temperature=1.5, top_k=3, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.5),
}
SECONDS = np.array([1.0, 1.45, 1.8, 1.9, 2.4])
CLIFF = np.array([1.0, 1.5, 1.95, 2.22, 2.62])
"""The first token never pays, several may: an invitation to look ahead."""


def chains_of(seed: int) -> Chains:
    generator = np.random.default_rng(seed)
    target, draft = generator.normal(0.0, 1.2, (2, 3, 3)).astype(np.float32)
    return Chains(target, draft, generator.permutation([0.3, 0.7, 0.97]), block=2)


@dataclass
class Rule:
    """How one row goes from drafts to tokens; the defaults are right, the controls change them."""

    reported: SamplingParams | None = None
    """What the proposals are computed with, if not with what drafts are drawn from."""
    swapped: bool = False
    bonus_from_draft: bool = False


@dataclass
class Row:
    """The exact distribution of one request's next tokens [V ** (g + 1)], given its drafts and its depth."""

    chains: Chains
    params: SamplingParams
    anchor: int
    rule: Rule

    def __post_init__(self) -> None:
        self._outcomes: dict[tuple[tuple[int, ...], int], np.ndarray] = {}
        self._length = self.chains.block + 1

    def target(self, output: tuple[int, ...]) -> np.ndarray:
        context = SamplingContext([self.anchor])
        context.extend(output)
        return target_distribution(self.chains.target[(self.anchor, *output)[-1]], self.params, context)

    def drawn(self, output: tuple[int, ...]) -> Proposal:
        return proposal(self.chains, self.params, (self.anchor, *output)[-1])

    def drafts(self) -> list[tuple[tuple[int, ...], float]]:
        """All blocks of drafts and how probable they are."""
        blocks: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for _ in range(self.chains.block):
            blocks = [
                ((*block, int(token)), chance * float(q))
                for block, chance in blocks
                for token, q in zip(self.drawn(block).candidates, self.drawn(block).probabilities, strict=True)
            ]
        return blocks

    def survival(self, drafts: tuple[int, ...]) -> np.ndarray:
        return np.cumprod([self.chains.confidence[token] for token in (self.anchor, *drafts[:-1])])

    def continued(self, output: tuple[int, ...]) -> np.ndarray:
        """All further tokens by the target itself: later rounds are lossless if this one is."""
        cells = np.zeros((self.chains.size,) * self._length)
        if len(output) == self._length:
            cells[output] = 1.0
            return cells
        for token, chance in enumerate(self.target(output)):
            if chance > 0.0:
                cells += chance * self.continued((*output, token))
        return cells

    def outcome(self, drafts: tuple[int, ...], depth: int) -> np.ndarray:
        key = (drafts[:depth], depth)
        if key not in self._outcomes:
            self._outcomes[key] = self._outcome(drafts, depth)
        return self._outcomes[key]

    def _outcome(self, drafts: tuple[int, ...], depth: int) -> np.ndarray:
        cells, reached = np.zeros((self.chains.size,) * self._length), 1.0
        for place in range(depth):
            output, token = drafts[:place], drafts[place]
            target, told = self.target(output), self.drawn(output)
            if self.rule.reported is not None:
                told = proposal(self.chains, self.rule.reported, (self.anchor, *output)[-1])
            stands = self._acceptance(target, told, token)
            weights = residual(target, told)
            for other, chance in enumerate(weights / weights.sum()):
                if chance > 0.0 and stands < 1.0:
                    cells += reached * (1.0 - stands) * chance * self.continued((*output, other))
            reached *= stands
        if self.rule.bonus_from_draft:
            told = self.drawn(drafts[:depth])
            for token, chance in zip(told.candidates.tolist(), told.probabilities, strict=True):
                cells += reached * chance * self.continued((*drafts[:depth], token))
            return cells
        return cells + reached * self.continued(drafts[:depth])

    def _acceptance(self, target: np.ndarray, told: Proposal, token: int) -> float:
        """Measure of the uniforms that accept; the edge is found by bisection."""
        if self.rule.swapped:
            return min(1.0, told.of(token) / target[token]) if target[token] > 0.0 else 1.0
        low, high = 0.0, math.nextafter(1.0, 0.0)
        if accepts(target, told, token, high):
            return 1.0
        if not accepts(target, told, token, low):
            return 0.0
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if accepts(target, told, token, middle) else (low, middle)
        return high


def depths_of(policy: DepthPolicy, survival: np.ndarray, seconds: np.ndarray) -> list[int]:
    count, block = survival.shape
    lagged = np.cumprod(np.full((count, block), 0.8), axis=1)
    return policy.depths(DraftRound(survival, lagged, np.full(count, block), seconds, count)).tolist()


def joint_error(policy: DepthPolicy, first: Row, second: Row, seconds: np.ndarray = SECONDS) -> float:
    """Largest deviation of the joint distribution of both requests' next tokens from the product of the target's."""
    joint = 0.0
    for (one, one_chance), (other, other_chance) in itertools.product(first.drafts(), second.drafts()):
        survival = np.array([first.survival(one), second.survival(other)])
        depths = depths_of(policy, survival, seconds)
        left, right = first.outcome(one, depths[0]).ravel(), second.outcome(other, depths[1]).ravel()
        joint = joint + one_chance * other_chance * np.outer(left, right)
    expected = np.outer(first.continued(()).ravel(), second.continued(()).ravel())
    assert expected.sum() == pytest.approx(1.0)
    return float(np.abs(joint - expected).max())


def rows_of(chains: Chains, params: SamplingParams, rule: Rule | None = None) -> tuple[Row, Row]:
    """One request with the parameters to test, one plain companion."""
    return Row(chains, params, 0, rule or Rule()), Row(chains, SETTINGS["plain"], 1, Rule())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_two_requests_are_jointly_distributed_as_the_target(name, policy):
    for seed in range(4):
        assert joint_error(policy, *rows_of(chains_of(seed), SETTINGS[name])) <= TOLERANCE


def test_the_settings_differ_and_the_policies_choose_different_depths():
    """Else the test above would show little."""
    chains = chains_of(0)
    pairs = [exact_pairs(chains, params, 0) for params in SETTINGS.values()]
    assert all(np.abs(one - other).max() > 1e-3 for one, other in itertools.combinations(pairs, 2))
    for policy in (Threshold(0.5), Causal(), Lagged()):
        seen = set()
        for seed in range(4):
            first, second = rows_of(chains_of(seed), SETTINGS["plain"])
            for (one, _), (other, _) in itertools.product(first.drafts(), second.drafts()):
                seen.add(tuple(depths_of(policy, np.array([first.survival(one), second.survival(other)]), SECONDS)))
        assert len(seen) >= 2, f"{policy} always chooses one of {seen}"


def worst(policy: DepthPolicy, rule: Rule, seconds: np.ndarray = SECONDS) -> float:
    return max(joint_error(policy, *rows_of(chains_of(seed), SETTINGS["plain"], rule), seconds) for seed in range(4))


CONTROLS = {
    "q of another temperature": (Fixed(2), Rule(reported=SamplingParams(temperature=0.7))),
    "p and q swapped": (Fixed(2), Rule(swapped=True)),
    "bonus token from q": (Fixed(1), Rule(bonus_from_draft=True)),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_defects_are_found(name):
    assert worst(*CONTROLS[name]) > 1e-3


def test_control_the_best_live_depths_are_found():
    assert worst(Retrospective(), Rule(), CLIFF) > 1e-3
    for policy in POLICIES:
        assert worst(policy, Rule(), CLIFF) <= TOLERANCE


def drafts_of_one_stream(first: Row, second: Row) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Drafts of both rows where the same uniforms draw them, and how probable they are."""
    states: list[tuple[tuple[int, ...], tuple[int, ...], float]] = [((), (), 1.0)]
    for _ in range(first.chains.block):
        following = []
        for one, other, chance in states:
            told = first.drawn(one), second.drawn(other)
            edges = np.unique(np.concatenate([[0.0], *(np.cumsum(each.probabilities)[:-1] for each in told), [1.0]]))
            for low, high in itertools.pairwise(edges.tolist()):
                tokens = [int(each.candidates[np.sum(np.cumsum(each.probabilities)[:-1] <= low)]) for each in told]
                following.append(((*one, tokens[0]), (*other, tokens[1]), chance * (high - low)))
        states = following
    yield from states


def marginal_error(policy: DepthPolicy, first: Row, second: Row) -> float:
    """Largest deviation of either row's own distribution, where both draw their drafts with the same uniforms."""
    totals = [0.0, 0.0]
    for one, other, chance in drafts_of_one_stream(first, second):
        depths = depths_of(policy, np.array([first.survival(one), second.survival(other)]), SECONDS)
        totals[0] = totals[0] + chance * first.outcome(one, depths[0])
        totals[1] = totals[1] + chance * second.outcome(other, depths[1])
    return max(
        float(np.abs(total - row.continued(())).max()) for total, row in zip(totals, (first, second), strict=True)
    )


def test_control_two_requests_must_not_share_a_stream():
    """Then one request's confidences know the other's drafts, and depths of the batch look ahead through them."""
    rows = [rows_of(chains_of(seed), SETTINGS["plain"]) for seed in range(4)]
    assert max(marginal_error(Causal(), *pair) for pair in rows) > 1e-3
    for policy in (Off(), Fixed(2), Threshold(0.5)):
        assert max(marginal_error(policy, *pair) for pair in rows) <= TOLERANCE, "these look at nobody else"


def appendix_a(policy: DepthPolicy) -> np.ndarray:
    """Distribution of the first token in the paper's counterexample: p = (.7, .3), q = (.5, .5), SPS = 1, .5, .45.

    A first survival of .8 is the true one (1 - TV); the second draft is certain after token 0 and hopeless after 1.
    """
    with np.errstate(divide="ignore"):
        # A third token, of probability 0, serves as the anchor.
        target, draft = (np.log(np.array([p] * 3, dtype=np.float32)) for p in ([0.7, 0.3, 0.0], [0.5, 0.5, 0.0]))
    chains = Chains(target, draft, np.array([1.0, 0.0, 0.8]), block=2)
    row = Row(chains, SamplingParams(temperature=1.0), 2, Rule())
    seconds = 1 / np.array([1.0, 0.5, 0.45])
    cells = sum(
        chance * row.outcome(drafts, depths_of(policy, row.survival(drafts)[None], seconds)[0])
        for drafts, chance in row.drafts()
    )
    return np.asarray(cells).sum(axis=(1, 2))


@pytest.mark.parametrize(
    "policy, expected",
    [(policy, (0.7, 0.3)) for policy in POLICIES] + [(Retrospective(), (0.85, 0.15))],
    ids=str,
)
def test_the_papers_counterexample(policy, expected):
    np.testing.assert_allclose(appendix_a(policy), [*expected, 0.0], atol=1e-7)
