"""Speculation is lossless, by drawing: the backend's own code over small Markov chains, chi-square on token pairs.

Each case decodes at least 100,000 times from the same anchor and compares the first two tokens with the target's exact
joint distribution; several requests share a batch, as depths of one depend on the others. Negative controls put in
the defects that engines really had, and must fail the same test.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
from markov_speculation import Chains, Decoder, Retrospective, Row, exact_pairs, proposal, remember_distributions
from ranking import ranked_rows
from scipy.stats import chisquare

from dspark_backend import verification
from dspark_backend.ranked import Head
from dspark_backend.request import SamplingParams
from dspark_backend.rng import Purpose, RngStreams
from dspark_backend.sampling import draw
from dspark_backend.scheduling import Causal, DepthPolicy, DraftRound, Fixed, IntArray, parse_policy
from dspark_backend.verification import TargetRows, VerifiedDrafts, take_tokens

DRAWS = 100_000
CONTROL_DRAWS = 12_000
REJECT = 1e-6
"""Fewer than 50 tests a run: false alarms below 1e-4, and the seeds are fixed anyway."""
FOUND = 1e-12
"""What a defect gives at most."""
SETTINGS = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=1.5),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8),
    "top_k": SamplingParams(temperature=1.0, top_k=2),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
    "repetition": SamplingParams(temperature=1.0, repetition_penalty=1.7),
    "presence, frequency": SamplingParams(temperature=1.0, presence_penalty=0.8, frequency_penalty=-0.3),
}
CASES = {
    "off": ["plain"],
    "fixed:1": ["cold"],
    "fixed:3": ["hot"],
    "threshold:0.45": ["min_p"],
    "causal": ["top_p", "repetition"],
    "lagged": ["top_k", "presence, frequency"],
}
"""Requests of one batch. test_losslessness_exact.py crosses every setting with every policy."""


@pytest.fixture(autouse=True)
def fast_distributions(monkeypatch):
    remember_distributions(monkeypatch)


def chains_of(seed: int, size: int = 4) -> Chains:
    generator = np.random.default_rng(seed)
    target, draft = generator.normal(0.0, 1.0, (2, size, size)).astype(np.float32)
    return Chains(target, draft, np.linspace(0.35, 0.98, size)[generator.permutation(size)])


def seconds_of(count: int, block: int = 3) -> np.ndarray:
    """Convex but for steps, which make searching beyond the first fall worth while."""
    tokens = np.arange(count * block + 1)
    return 1.0 + 0.3 * tokens / count + 0.04 * (tokens % 3 == 1)


def decoder_of(policy: DepthPolicy, settings: list[str], seed: int, chains: Chains | None = None, **options) -> Decoder:
    chains = chains or chains_of(seed)
    rows = [
        (replace(SETTINGS[name], seed=seed + row), (row + 1) % chains.size, policy) for row, name in enumerate(settings)
    ]
    return Decoder.build(chains, rows, options.pop("seconds", seconds_of(len(rows), chains.block)), **options)


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square; cells too rare for it count as one."""
    if counts[expected == 0].any():
        return 0.0
    wanted = expected * counts.sum() / expected.sum()
    common = wanted >= 10.0
    seen, wanted = (np.append(cells[common], cells[~common].sum()) for cells in (counts, wanted))
    possible = wanted > 0
    assert np.count_nonzero(possible) > 1, "a certain outcome tests nothing"
    return float(chisquare(seen[possible], wanted[possible]).pvalue)


def p_values(decoder: Decoder, counts: np.ndarray) -> list[float]:
    """One a row: pairs of tokens against the target's own."""
    return [
        p_value(cells.ravel(), exact_pairs(decoder.chains, row.params, row.anchor).ravel())
        for row, cells in zip(decoder.rows, counts, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("policy", CASES)
def test_pairs_are_distributed_as_the_target(policy):
    decoder = decoder_of(parse_policy(policy), CASES[policy], seed=3)
    values = p_values(decoder, decoder.counts(DRAWS))
    assert min(values) > REJECT, dict(zip(CASES[policy], values, strict=True))
    chosen = np.count_nonzero(decoder.depths_seen.sum(axis=0))
    assert chosen == 1 if policy in ("off", "fixed:1", "fixed:3") else chosen >= 2, "a policy that never chooses"


def test_the_first_tokens_of_two_requests_are_independent():
    decoder = decoder_of(Causal(), ["plain", "plain"], seed=3)
    cells = np.zeros((4, 4))
    for (one, _), (other, _) in decoder.pairs(CONTROL_DRAWS):
        cells[one, other] += 1
    firsts = [exact_pairs(decoder.chains, row.params, row.anchor).sum(axis=1) for row in decoder.rows]
    assert p_value(cells.ravel(), np.outer(*firsts).ravel()) > REJECT


def appendix_a(policy: DepthPolicy) -> tuple[np.ndarray, int]:
    """First tokens of the paper's counterexample: p = (.7, .3), q = (.5, .5), SPS = 1, .5, .45."""
    with np.errstate(divide="ignore"):
        # A third token, of probability 0, serves as the anchor.
        target, draft = (np.log(np.array([p] * 3, dtype=np.float32)) for p in ([0.7, 0.3, 0.0], [0.5, 0.5, 0.0]))
    chains = Chains(target, draft, np.array([1.0, 0.0, 0.8]), block=2)
    rows = [(SamplingParams(temperature=1.0, seed=1), 2, policy)]
    decoder = Decoder.build(chains, rows, 1 / np.array([1.0, 0.5, 0.45]))
    counts = decoder.counts(CONTROL_DRAWS)[0]
    return counts.sum(axis=1)[:2], int(decoder.depths_seen[0, 2])


def test_the_papers_counterexample():
    right, wrong = np.array([0.7, 0.3]), np.array([0.85, 0.15])
    causal, deep = appendix_a(Causal())
    assert deep == 0
    assert p_value(causal, right) > REJECT
    assert p_value(causal, wrong) < FOUND
    retrospective, deep = appendix_a(Retrospective())
    assert 0 < deep < CONTROL_DRAWS
    assert p_value(retrospective, wrong) > REJECT
    assert p_value(retrospective, right) < FOUND


def test_control_the_best_live_depths_are_found():
    policies: list[DepthPolicy] = [Retrospective(), Causal()]
    wrong, right = (p_values(one, one.counts(CONTROL_DRAWS)) for one in (steep(policy) for policy in policies))
    assert min(wrong) < FOUND, wrong
    assert min(right) > REJECT, right


def steep(policy: DepthPolicy) -> Decoder:
    """One draft never pays; three may, if the tokens drafted first promise it."""
    chains = chains_of(3)
    rows = [(replace(SETTINGS["plain"], seed=3), int(chains.confidence.argmax()), policy)]
    return Decoder.build(chains, rows, np.array([1.0, 2.0, 2.6, 2.75]))


def test_control_q_of_another_temperature_is_found():
    decoder = decoder_of(Fixed(2), ["plain"], seed=3, reported=SamplingParams(temperature=0.8))
    assert p_values(decoder, decoder.counts(CONTROL_DRAWS))[0] < FOUND


def test_control_p_and_q_swapped_is_found(monkeypatch):
    monkeypatch.setattr(
        verification,
        "accepts",
        lambda target, told, token, uniform: bool(uniform * target[token] < told.of(token)),
    )
    decoder = decoder_of(Fixed(2), ["plain"], seed=3)
    assert p_values(decoder, decoder.counts(CONTROL_DRAWS))[0] < FOUND


class BonusFromDraft(Decoder):
    """Where all drafts stand, the token behind them is another draft."""

    def take(self, row: Row, drafts: VerifiedDrafts, target: TargetRows) -> None:
        accepted, output = take_tokens(row.sequence, drafts, target), row.sequence.context
        if accepted == len(drafts.tokens):
            output.rollback(output.output_length - 1)
            told = proposal(self.chains, row.params, row.last)
            place = draw(told.probabilities, row.sequence.rng.uniform(Purpose.TARGET))
            output.append(int(told.candidates[place]))


def test_control_a_bonus_token_from_q_is_found():
    decoder = decoder_of(Fixed(1), ["plain"], seed=3)
    broken = BonusFromDraft(decoder.chains, decoder.rows, decoder.seconds)
    assert p_values(broken, broken.counts(CONTROL_DRAWS))[0] < FOUND


class SharedStreams(RngStreams):
    """Every purpose has the same numbers, as where each part of an engine seeds a generator with the request's seed."""

    def generator(self, purpose: Purpose) -> np.random.Generator:
        if purpose not in self._generators:
            self._generators[purpose] = np.random.Generator(np.random.PCG64(self.seed))
        return self._generators[purpose]


@pytest.mark.parametrize("streams, found", [(SharedStreams, True), (RngStreams, False)])
def test_control_one_stream_for_drafts_and_acceptance_is_found(streams, found):
    decoder = decoder_of(Fixed(2), ["plain"], seed=3)
    cells = np.zeros((4, 4))
    for seed in range(CONTROL_DRAWS):
        decoder.rows[0].sequence.rng = streams(seed)
        for pairs in decoder.pairs(1):
            cells[pairs[0]] += 1
    value = p_value(cells.ravel(), exact_pairs(decoder.chains, SETTINGS["plain"], decoder.rows[0].anchor).ravel())
    assert value < FOUND if found else value > REJECT


@dataclass(frozen=True)
class Noisy:
    """Any depths that do not look at this round are lossless."""

    generator: np.random.Generator
    drafts = True

    def depths(self, draft_round: DraftRound) -> IntArray:
        return self.generator.integers(0, draft_round.limits + 1)


def test_depths_at_random_are_lossless():
    decoder = decoder_of(Noisy(np.random.default_rng(0)), ["plain", "top_k"], seed=3)
    assert min(p_values(decoder, decoder.counts(CONTROL_DRAWS))) > REJECT


class CountedRows:
    """Logits of which only so many rows are read."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits
        self.reads = 0

    def __getitem__(self, place: int) -> np.ndarray:
        self.reads += 1
        return self.logits[place]


class RankedDecoder(Decoder):
    """The rows are on a device, which ranks half of their tokens."""

    @cached_property
    def reads(self) -> Counter[SamplingParams]:
        """Rows that were read, by request."""
        return Counter()

    @cached_property
    def _known(self) -> dict[tuple[float, bytes], TargetRows]:
        return {}

    def take(self, row: Row, drafts: VerifiedDrafts, target: TargetRows) -> None:
        known = self._known
        key = row.params.temperature, target.logits.tobytes()
        if key not in known:
            ranked = ranked_rows(target.logits, row.params.temperature, self.chains.size // 2)
            known[key] = replace(target, ranked=ranked)
        rows = CountedRows(target.logits)
        take_tokens(row.sequence, drafts, replace(known[key], logits=rows))
        self.reads[row.params] += rows.reads


RANKED = ["plain", "top_p", "top_k"]
RANKED_DRAWS = 5_000


def ranked_decoder() -> RankedDecoder:
    chains = chains_of(5, size=8)
    rows = [
        (replace(SETTINGS[name], seed=5 + row), (row + 1) % chains.size, Fixed(1)) for row, name in enumerate(RANKED)
    ]
    return RankedDecoder.build(chains, rows, seconds_of(len(rows)))


def test_draws_from_ranked_heads_are_distributed_as_the_target():
    decoder = ranked_decoder()
    values = p_values(decoder, decoder.counts(RANKED_DRAWS))
    assert min(values) > REJECT, dict(zip(RANKED, values, strict=True))
    plain, _, top_k = (decoder.reads[row.params] for row in decoder.rows)
    assert top_k == 0 < plain < RANKED_DRAWS, "a pair takes two rows at least"


def test_control_another_draw_where_the_head_does_not_decide_is_found(monkeypatch):
    """The same number once more, through the row in the order of ids: most of the head's tokens come too often."""
    monkeypatch.setattr(Head, "place", lambda self, weights, uniform: draw(weights, uniform))
    decoder = ranked_decoder()
    values = dict(zip(RANKED, p_values(decoder, decoder.counts(RANKED_DRAWS)), strict=True))
    assert values["plain"] < FOUND
    assert values["top_k"] > REJECT, "heads that are all there is are asked nothing else"
