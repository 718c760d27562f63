"""take_tokens on real sequences: where drafts stand and fall, and that speculation changes nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markov_speculation import sequence_of, target_rows
from sample_tokenizers import words

from dspark_backend.acceptance import Proposal
from dspark_backend.bad_words import BadWords, TokenMask
from dspark_backend.delta import FinishReason
from dspark_backend.errors import DSparkError, InvalidRequest
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_backend.rng import Purpose, RngStreams
from dspark_backend.sampling import draw, log_probability, target_distribution
from dspark_backend.sequence import SequenceState
from dspark_backend.verification import NO_DRAFTS, TargetRows, VerifiedDrafts, take_tokens

V = 6
EOS = 5
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=1.0, seed=7)


def logits_for(*tokens: int) -> np.ndarray:
    """Rows whose argmax are these tokens, the rest in an order of their own."""
    rows = np.tile(np.linspace(0.0, 1.0, V, dtype=np.float32), (len(tokens), 1))
    rows[np.arange(len(tokens)), list(tokens)] = 3.0
    return rows


def sequence(sampling: SamplingParams = GREEDY, max_tokens: int = 100, mask=None, tokenizer=None, **options):
    request = GenerationRequest(input_ids=(0,), sampling=sampling, **options)
    return sequence_of(request, max_tokens, mask, tokenizer)


def output(state: SequenceState) -> list[int]:
    return list(state.context.output_ids)


def take(state: SequenceState, logits: np.ndarray, *drafts: int, proposals: tuple[Proposal, ...] = ()) -> int:
    return take_tokens(state, VerifiedDrafts(drafts, proposals), target_rows(logits))


def certain(token: int) -> Proposal:
    return Proposal(np.array([token]), np.array([1.0]))


def flat() -> Proposal:
    return Proposal(np.arange(V), np.full(V, 1 / V))


@pytest.mark.parametrize("falls", range(4))
def test_greedy_falls_at_every_place(falls):
    state, drafts = sequence(), [1, 2, 3]
    wanted = [1, 2, 3, 4]
    if falls < 3:
        wanted[falls] = 0
    assert take(state, logits_for(*wanted), *drafts) == falls
    assert output(state) == wanted[: falls + 1]
    assert state.finish_reason is None


def test_without_drafts_one_token_is_taken():
    state = sequence()
    logits = logits_for(2)
    assert take_tokens(state, NO_DRAFTS, target_rows(logits)) == 0
    assert output(state) == [2]


def test_greedy_reads_no_logits():
    """The graph's argmax is the answer: ties must not be broken a second way, and V numbers a token cost time."""
    state = sequence()
    unread = np.full((2, V), np.nan, dtype=np.float32)
    assert take_tokens(state, VerifiedDrafts((3,)), TargetRows(unread, [3, 4], [1.0, 2.0])) == 1
    assert output(state) == [3, 4]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("at", range(3))
def test_eos_inside_the_prefix_ends_the_sequence(sampling, at):
    drafts = [1, 2, 3]
    drafts[at] = EOS
    logits = np.full((4, V), -np.inf, dtype=np.float32)
    logits[np.arange(4), [*drafts, 4]] = 0.0
    state = sequence(sampling, mask=TokenMask(end_ids=(EOS,)))
    assert take(state, logits, *drafts, proposals=tuple(certain(token) for token in drafts)) == at + 1
    assert output(state) == drafts[: at + 1]
    assert state.finish_reason is FinishReason.STOP


def test_ignored_eos_goes_on():
    state = sequence(mask=TokenMask(end_ids=(EOS,)), ignore_eos=True)
    assert take(state, logits_for(EOS, EOS, 1), EOS, EOS) == 2
    assert output(state) == [EOS, EOS, 1]
    assert state.finish_reason is None


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
def test_max_tokens_inside_the_prefix(max_tokens):
    state = sequence(max_tokens=max_tokens)
    assert take(state, logits_for(1, 2, 3, 4), 1, 2, 3) == min(max_tokens, 3)
    assert output(state) == [1, 2, 3, 4][:max_tokens]
    assert state.finish_reason is FinishReason.LENGTH


def test_min_tokens_forbids_eos_place_by_place():
    """EOS is the favourite everywhere; the draft of it stands from the third token on."""
    logits = logits_for(EOS, EOS, EOS, EOS)
    logits[:, 1] = 2.0
    mask = TokenMask(min_tokens=2, end_ids=(EOS,))
    state = sequence(mask=mask, min_tokens=2)
    assert take(state, logits, 1, 1, EOS) == 3
    assert output(state) == [1, 1, EOS]
    early = sequence(mask=mask, min_tokens=2)
    assert take(early, logits, 1, EOS, EOS) == 1
    assert output(early) == [1, 1]
    assert early.finish_reason is None


def test_a_stop_string_inside_the_prefix():
    """Tokens of the word tokenizer: a, bc, d; the text is theirs with spaces."""
    state = sequence(tokenizer=words(), stop_words=("bc d",))
    assert take(state, logits_for(1, 2, 0, 0), 1, 2, 0) == 2
    assert output(state) == [1, 2]
    assert state.finish_reason is FinishReason.STOP
    delta = state.take_delta()
    assert delta is not None
    assert "bc" not in delta.text
    assert delta.token_ids == (1, 2)


def test_a_stop_string_before_min_tokens_does_not_count():
    state = sequence(tokenizer=words(), stop_words=("bc d",), min_tokens=3)
    assert take(state, logits_for(1, 2, 0, 0), 1, 2, 0) == 3
    assert output(state) == [1, 2, 0, 0]
    assert state.finish_reason is None


def test_a_replacement_that_ends_the_sequence_is_no_draft():
    state = sequence(mask=TokenMask(end_ids=(EOS,)))
    assert take(state, logits_for(1, EOS, 0), 1, 2) == 1
    assert output(state) == [1, EOS]
    assert state.finish_reason is FinishReason.STOP


@st.composite
def decodings(draw_value):
    """A greedy request with everything that looks at the output so far, and the target's table of logits."""
    quarters = st.integers(-12, 12).map(lambda n: n / 4)
    table = np.array(draw_value(st.lists(quarters, min_size=V * V, max_size=V * V)), dtype=np.float32).reshape(V, V)
    tokens = st.integers(0, V - 1)
    words_banned = draw_value(st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=3))
    banned_alone = {word[0] for word in words_banned if len(word) == 1}
    mask = TokenMask(
        BadWords(tuple(word for word in words_banned if len(word) > 1 or len(banned_alone) < 3)),
        min_tokens=draw_value(st.integers(0, 6)),
        end_ids=(EOS,),
    )
    sampling = SamplingParams(
        repetition_penalty=draw_value(st.sampled_from([1.0, 0.5, 2.0])),
        presence_penalty=draw_value(st.sampled_from([0.0, -0.5, 1.25])),
        frequency_penalty=draw_value(st.sampled_from([0.0, -0.25, 0.5])),
    )
    blocks = draw_value(st.lists(st.lists(tokens, max_size=4), min_size=1, max_size=10))
    return table, mask, sampling, blocks, draw_value(st.integers(1, 12))


def run(state: SequenceState, table: np.ndarray, blocks: list[list[int]], helpful: list[int] | None = None) -> None:
    """Round after round with these drafts; ``helpful`` replaces some by what will be right."""
    step = 0
    while state.finish_reason is None:
        drafts = list(blocks[step % len(blocks)])
        for place in range(len(drafts)):
            at = state.context.output_length + place
            if helpful is not None and at < len(helpful) and (step + place) % 4:
                drafts[place] = helpful[at]
        last = output(state)[-1] if output(state) else 0
        take(state, table[[last, *drafts]], *drafts)
        step += 1


@settings(deadline=None, max_examples=200)
@given(decodings())
def test_greedy_speculation_changes_no_token(decoding):
    table, mask, sampling, blocks, max_tokens = decoding
    options = {"max_tokens": max_tokens, "mask": mask, "min_tokens": mask.min_tokens, "log_probs": True}
    plain, speculating = sequence(sampling, **options), sequence(sampling, **options)
    try:
        run(plain, table, [[]])
    except InvalidRequest:
        with pytest.raises(InvalidRequest):
            run(speculating, table, blocks, output(plain))
        return
    run(speculating, table, blocks, output(plain))
    assert output(speculating) == output(plain)
    assert speculating.finish_reason is plain.finish_reason
    deltas = plain.take_delta(), speculating.take_delta()
    assert deltas[0] is not None and deltas[1] is not None
    assert deltas[0].log_probs == deltas[1].log_probs


def test_bad_words_look_at_the_drafts_before_them():
    mask = TokenMask(BadWords(((1, 2),)))
    state = sequence(mask=mask)
    assert take(state, logits_for(1, 2, 3), 1, 2) == 1
    assert output(state) == [1, EOS], "the best token but the forbidden one"
    assert take(sequence(mask=mask), logits_for(3, 2, 3), 3, 2) == 2


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(SAMPLED, top_k=2, presence_penalty=1.5)])
def test_log_probs_are_the_targets_own_one_a_token(sampling):
    state = sequence(sampling, log_probs=True)
    logits = logits_for(1, 2, 3)
    take(state, logits, 1, 2, proposals=(certain(1), certain(2)))
    delta = state.take_delta()
    assert delta is not None
    expected = [float(log_probability(row, token)) for row, token in zip(logits, delta.token_ids, strict=False)]
    assert len(delta.log_probs) == len(delta.token_ids)
    assert list(delta.log_probs) == expected


class CountingStreams(RngStreams):
    """Keeps what was asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked: list[Purpose] = []

    def uniform(self, purpose: Purpose) -> float:
        self.asked.append(purpose)
        return super().uniform(purpose)


def impossible(*tokens: int) -> np.ndarray:
    """Logits that exclude these tokens."""
    row = np.zeros(V, dtype=np.float32)
    row[list(tokens)] = -np.inf
    return row


def test_each_purpose_has_its_own_numbers():
    even = np.zeros(V, dtype=np.float32)
    logits = np.stack([even, even, impossible(2), even])
    state = sequence(SAMPLED)
    state.rng = streams = CountingStreams(7)
    # q = p stands whatever the number; a draft that the target excludes falls whatever the number.
    assert take(state, logits, 0, 1, 2, proposals=(flat(),) * 3) == 2
    assert streams.asked == [Purpose.ACCEPT] * 3 + [Purpose.RESIDUAL]
    fresh = RngStreams(7)
    target = target_distribution(logits[2], SAMPLED, state.context)
    expected = draw(np.maximum(target - 1 / V, 0.0), fresh.uniform(Purpose.RESIDUAL))
    assert output(state) == [0, 1, expected]
    streams.asked.clear()
    assert take(state, np.stack([even, even]), 4, proposals=(flat(),)) == 1
    assert streams.asked == [Purpose.ACCEPT, Purpose.TARGET]
    target = target_distribution(even, SAMPLED, state.context)
    assert output(state)[-1] == draw(target, fresh.uniform(Purpose.TARGET)), "the first number of its stream"


def test_greedy_uses_no_random_numbers():
    for sampling in (GREEDY, SamplingParams(presence_penalty=0.1)):
        state = sequence(sampling)
        state.rng = streams = CountingStreams(7)
        take(state, logits_for(1, 2, 3), 1, 0)
        assert streams.asked == []


def test_a_sampled_draft_without_its_proposal_is_refused():
    with pytest.raises(ValueError, match="proposal"):
        take(sequence(SAMPLED), logits_for(1, 2), 1)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SamplingParams(presence_penalty=1.0)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_an_error(sampling, value):
    logits = logits_for(1, 2, 3)
    logits[1, 4] = value
    state = sequence(sampling)
    with pytest.raises(DSparkError, match="finite"):
        take(state, logits, 1, 2, proposals=(certain(1), certain(2)))


def test_broken_logits_behind_the_fall_do_not_matter():
    logits = logits_for(1, 2, 3)
    logits[2] = np.nan
    state = sequence()
    assert take_tokens(state, VerifiedDrafts((1, 0)), target_rows(logits)) == 1
    assert output(state) == [1, 2]


def test_masks_that_leave_nothing_are_an_error():
    state = sequence(mask=TokenMask(BadWords(tuple((1, token) for token in range(V)))))
    with pytest.raises(InvalidRequest, match="bad_words"):
        take(state, logits_for(1, 2), 1)
