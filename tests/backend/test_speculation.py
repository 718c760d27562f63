"""The engine with a drafter: nothing changes but the number of steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import artifacts
import numpy as np
import pytest
from engines import Driver, KeepingSink, ids, mixed_requests, prompt
from speculation import CHEAP, DEAR, POLICIES, SpeculatingDriver

from dspark_backend.cost_cache import CostCache
from dspark_backend.delta import FinishReason
from dspark_backend.errors import InternalError, InvalidRequest
from dspark_export.drafter import DrafterExport, export_drafter


@pytest.fixture(scope="module")
def golden_drafters(golden_artifacts, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafters")
    for name, verifier in golden_artifacts.items():
        checkpoint = artifacts.GOLDEN / name / "drafter"
        export_drafter(DrafterExport(checkpoint, verifier, root / name), artifacts.silent)
    return {name: root / name for name in golden_artifacts}


@pytest.fixture
def speculating(golden_artifacts, golden_drafters):
    def make(name="qwen3_vanilla", **options):
        return SpeculatingDriver(golden_artifacts[name], golden_drafters[name], **options)

    return make


def golden_request(name, max_tokens=60, **options):
    golden = artifacts.golden_arrays(name)
    # A golden text goes on after an end-of-sequence token.
    return ids(*golden["prompt"].tolist(), max_tokens=max_tokens, ignore_eos=True, **options), golden


@pytest.mark.parametrize("name", artifacts.GOLDEN_NAMES)
def test_accepted_counts_of_the_reference(speculating, name):
    wanted, golden = golden_request(name)
    driver = speculating(name, policy="fixed:64")
    (sink,) = driver.run(wanted)
    assert sink.tokens() == golden["greedy"].tolist()
    expected = golden["e2e_accepted_per_round"].tolist()
    assert [record.accepted for record in driver.records][: len(expected)] == expected


def test_drafts_stand_at_the_least_temperature_there_is(speculating):
    greedy, golden = golden_request("qwen3_vanilla")
    least, _ = golden_request("qwen3_vanilla", temperature=1.4e-45, seed=1)
    answers = speculating(policy="fixed:64").run(greedy, least)
    assert [sink.tokens() for sink in answers] == [golden["greedy"].tolist()] * 2
    accepted = [sink.deltas[-1].usage.accepted_draft_tokens for sink in answers]
    assert accepted[0] == accepted[1] > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", artifacts.GOLDEN_NAMES)
def test_greedy_text_is_the_same_under_every_policy(speculating, name, policy):
    wanted, golden = golden_request(name)
    (sink,) = speculating(name, policy=policy).run(wanted)
    assert sink.tokens() == golden["greedy"].tolist()
    usage = sink.deltas[-1].usage
    assert usage.accepted_draft_tokens <= usage.verified_draft_tokens <= usage.draft_tokens
    assert usage.rounds == usage.output_tokens - 1 - usage.accepted_draft_tokens
    if policy.startswith("fixed"):
        assert usage.accepted_draft_tokens > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", artifacts.GOLDEN_NAMES)
def test_sixteen_at_once_mixed_with_sampled_ones(speculating, golden_artifacts, name, policy):
    greedy = [ids(*prompt(index, 5 + 11 * index), max_tokens=8 + 2 * index) for index in range(8)]
    sampled = [
        ids(
            *prompt(50 + index, 9), max_tokens=20, temperature=0.5 + 0.2 * index, top_p=0.9, seed=index, ignore_eos=True
        )
        for index in range(8)
    ]
    expected = [sink.tokens() for sink in Driver(golden_artifacts[name]).run(*greedy)]
    mixture = [request for pair in zip(greedy, sampled, strict=True) for request in pair]
    driver = speculating(name, policy=policy)
    sinks = driver.run(*mixture)
    assert [sink.tokens() for sink in sinks[::2]] == expected
    assert all(len(sink.tokens()) == 20 for sink in sinks[1::2])
    assert not driver.engine.cache.active


def test_policies_of_requests_in_one_batch(speculating):
    _, golden = golden_request("qwen3_vanilla")
    requests = [golden_request("qwen3_vanilla", draft_policy=policy)[0] for policy in POLICIES]
    requests.append(golden_request("qwen3_vanilla", max_draft_tokens=0)[0])
    requests.append(golden_request("qwen3_vanilla", draft_policy="fixed:64", max_draft_tokens=2)[0])
    driver = speculating()
    sinks = driver.run(*requests)
    assert all(sink.tokens() == golden["greedy"].tolist() for sink in sinks)
    usages = [sink.deltas[-1].usage for sink in sinks]
    assert usages[0].draft_tokens == usages[-2].draft_tokens == 0
    assert usages[1].verified_draft_tokens <= usages[1].rounds
    assert usages[-1].verified_draft_tokens <= 2 * usages[-1].rounds


@pytest.mark.parametrize("policy", ["fixed:1", "fixed:3", "threshold:0.2"])
def test_sampled_requests_are_reproducible_alone_and_in_a_batch(speculating, policy):
    """The static policies look at nobody else, not even for how far to draft, so a seed pins the tokens themselves."""
    wanted = ids(*prompt(1, 12), max_tokens=30, temperature=0.9, seed=7, draft_policy=policy)
    alone = speculating().run(wanted)[0].tokens()
    batch = speculating().run(wanted, *mixed_requests(), wanted)
    assert batch[0].tokens() == batch[-1].tokens() == alone


@pytest.mark.parametrize(("policy", "width"), [("fixed:1", 1), ("fixed:3", 3), ("fixed:64", 7), ("threshold:0.2", 7)])
def test_nobody_drafts_what_nobody_verifies(speculating, policy, width):
    driver = speculating(policy=policy)
    usage = driver.run(golden_request("qwen3_vanilla")[0])[0].deltas[-1].usage
    assert usage.draft_tokens % width == 0 and usage.draft_tokens // width in (usage.rounds, usage.rounds - 1)
    assert {record.confidence_logits.shape for record in driver.records} == {(width,)}


def test_an_artifact_with_whole_blocks_only_drafts_whole_blocks(speculating, monkeypatch):
    wanted, golden = golden_request("qwen3_vanilla")
    driver = speculating(policy="fixed:1")
    monkeypatch.setattr(driver.drafter, "_artifact", replace(driver.drafter.artifact, variable_width=False))
    sink = driver.run(wanted)[0]
    assert sink.tokens() == golden["greedy"].tolist()
    assert {record.confidence_logits.shape for record in driver.records} == {(7,)}
    assert sink.deltas[-1].usage.verified_draft_tokens <= sink.deltas[-1].usage.rounds


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_chunks_of_the_prompt_feed_the_drafter(speculating, chunk):
    """The drafts themselves are equal, so the accepted counts are."""
    wanted, _ = golden_request("qwen3_rnn")
    counts = []
    for size in (256, chunk):
        driver = speculating("qwen3_rnn", policy="fixed:64", prefill_chunk=size, prefill_chunk_busy=size)
        driver.run(wanted)
        counts.append([record.accepted for record in driver.records])
    assert counts[0] == counts[1] and sum(counts[0]) > 0


def test_long_prompts_do_not_pile_up_features(speculating, monkeypatch):
    driver = speculating(policy="fixed:2", prefill_chunk=100, prefill_chunk_busy=100)
    commits = []
    real = driver.drafter.commit_context
    monkeypatch.setattr(driver.drafter, "commit_context", lambda rows: (commits.append(rows.num_rows), real(rows)))
    (sink,) = driver.run(ids(*prompt(3, 400), max_tokens=10))
    assert len(sink.tokens()) == 10 and sum(commits) >= 300


@pytest.mark.parametrize("length", [256, 257, 300])
def test_a_prompt_that_is_flushed_as_it_ends_is_drafted_for(speculating, length):
    """Nothing waits for the first drafting round then."""
    wanted = ids(*prompt(3, length), max_tokens=20)
    texts, counts = [], []
    for chunk in (32, 512):
        driver = speculating(policy="fixed:64", prefill_chunk=chunk, prefill_chunk_busy=chunk)
        texts.append(driver.run(wanted)[0].tokens())
        counts.append([record.accepted for record in driver.records])
    assert texts[0] == texts[1] and counts[0] == counts[1] and len(texts[0]) == 20


def test_prefixes_are_reused_with_the_drafters_rows(speculating):
    wanted, _ = golden_request("qwen3_vanilla", draft_policy="fixed:64")
    driver = speculating()
    first = driver.run(wanted)[0]
    fresh = [record.accepted for record in driver.records]
    driver.records.clear()
    again = driver.run(wanted)[0]
    assert again.tokens() == first.tokens()
    assert driver.engine.metrics.prefix_cache_hit_tokens_total.value > 0
    assert [record.accepted for record in driver.records] == fresh


def test_rows_without_drafter_context_are_not_reused_by_one_that_drafts(speculating):
    off, golden = golden_request("qwen3_vanilla", draft_policy="off")
    drafting, _ = golden_request("qwen3_vanilla", draft_policy="fixed:64")
    driver = speculating()
    driver.run(off)
    (sink,) = driver.run(drafting)
    assert driver.engine.metrics.prefix_cache_hit_tokens_total.value == 0
    expected = golden["e2e_accepted_per_round"].tolist()
    assert [record.accepted for record in driver.records][: len(expected)] == expected
    assert sink.tokens() == golden["greedy"].tolist()


def test_prefixes_are_reused_where_the_drafter_rests(speculating):
    """What a sequence that never drafted has put aside for the drafter reaches it in time for others to copy."""
    hits = {}
    for policy in ("off", "causal"):
        driver = speculating(cost=DEAR, policy=policy)
        total = driver.engine.metrics.prefix_cache_hit_tokens_total
        driver.run(ids(*prompt(1, 9), max_tokens=4))  # the first one drafts in any case
        drafted = driver.engine.metrics.spec_decode_num_drafts_total.value
        seen, answers = [], []
        # After one that is gone, beside one that runs, siblings, and after one of a single token.
        for wanted in (
            [ids(*prompt(2, 200), max_tokens=10)],
            [ids(*prompt(2, 200), max_tokens=10)],
            [ids(*prompt(4, 120), max_tokens=10, num_sequences=4)],
            [ids(*prompt(5, 120), max_tokens=1)],
            [ids(*prompt(5, 120), max_tokens=10)],
        ):
            before = total.value
            answers += [sink.tokens() for sink in driver.run(*wanted)]
            seen.append(total.value - before)
        assert driver.engine.metrics.spec_decode_num_drafts_total.value == drafted
        hits[policy] = seen, answers
    assert hits["causal"] == hits["off"]
    assert [count > 100 for count in hits["off"][0]] == [False, True, True, False, True]


@pytest.mark.parametrize("siblings", [1, 3])
def test_rows_that_cannot_be_put_aside_cost_their_request(speculating, monkeypatch, siblings):
    """A drafter that fails while a prompt waits to be copied for another sequence."""
    driver = speculating(cost=DEAR, policy="causal")
    driver.run(ids(*prompt(1, 9), max_tokens=4))
    _, holder = driver.submit(ids(*prompt(4, 120), max_tokens=10, num_sequences=siblings))
    driver.engine.step()

    def fail(rows):
        raise RuntimeError("no context today")

    monkeypatch.setattr(driver.drafter, "commit_context", fail)
    other = ids(*prompt(4, 120), max_tokens=1)
    (sink,) = driver.run(other)
    assert "no context today" in str(holder.failure)
    monkeypatch.undo()
    # Its own answer was complete when the drafter failed again.
    assert sink.tokens() == driver.run(other)[0].tokens()
    assert not driver.engine.cache.active


def test_a_failed_draft_leaves_no_promise_of_rows(speculating, monkeypatch):
    """The rows of all siblings were on their way to the drafter: none may be reused, whoever of them fails first."""
    driver = speculating(policy="fixed:3", prefix_reuse=True)
    draft = driver.drafter.draft

    def fail(batch):
        if len(batch.anchors) < 3:
            return draft(batch)
        raise RuntimeError("no draft today")

    monkeypatch.setattr(driver.drafter, "draft", fail)
    (sink,) = driver.run(ids(*prompt(1, 40), max_tokens=20, num_sequences=3))
    assert "no draft today" in str(sink.failure)
    held = [slot for slot in driver.engine.cache._slots if slot.length]
    assert len(held) == 3
    assert [slot.context_length for slot in held] == [0, 0, 0]


@pytest.mark.parametrize(("tokens", "lost"), [(28, False), (29, True)])
def test_rows_that_cannot_be_flushed_cost_no_complete_answer(speculating, monkeypatch, tokens, lost):
    """The 257th row that waits for the drafter is that of the 28th token."""
    driver = speculating(cost=DEAR, policy="causal")
    driver.run(ids(*prompt(1, 9), max_tokens=4))

    def fail(rows):
        raise RuntimeError("no context today")

    monkeypatch.setattr(driver.drafter, "commit_context", fail)
    (sink,) = driver.run(ids(*prompt(4, 230), max_tokens=tokens))
    assert (sink.failure is not None) == lost
    assert lost or len(sink.tokens()) == tokens
    assert not driver.engine.cache.active


def test_sequences_of_one_request(speculating):
    wanted, golden = golden_request("qwen3_gated", num_sequences=3, draft_policy="fixed:64")
    (sink,) = speculating("qwen3_gated").run(wanted)
    assert all(sink.tokens(index) == golden["greedy"].tolist() for index in range(3))


def test_the_end_inside_an_accepted_prefix(speculating):
    for length in range(1, 30):
        wanted, golden = golden_request("qwen3_vanilla", max_tokens=length, draft_policy="fixed:64")
        assert speculating().run(wanted)[0].tokens() == golden["greedy"][:length].tolist()


def test_drafts_behind_the_end_of_a_text_are_not_taken_for_rejected(golden_artifacts, golden_drafters, tmp_path):
    """They were never compared: a calibration that counts them learns that drafts fail where answers end."""
    wanted, golden = golden_request("qwen3_vanilla")
    answer = golden["greedy"].tolist()
    end = next(place for place in range(10, 40) if answer[place] not in answer[:place])
    verifier = artifacts.variant(golden_artifacts["qwen3_vanilla"], tmp_path / "ends", eos_token_ids=[answer[end]])
    driver = SpeculatingDriver(verifier, golden_drafters["qwen3_vanilla"], policy="fixed:64")
    text, inner = [*golden["prompt"].tolist(), *answer], driver.drafter.draft

    def perfect(batch):
        output, start = inner(batch), int(batch.starts[0]) + 1
        tokens = np.array([text[start : start + 7]])
        return replace(output, tokens=tokens)

    driver.drafter.draft = perfect
    (sink,) = driver.run(replace(wanted, ignore_eos=False))
    assert sink.tokens() == answer[: end + 1] and sink.reason() is FinishReason.STOP
    *whole, last = driver.records
    assert all(record.verified == record.accepted == 7 for record in whole)
    # Seven drafts and the one that followed them in every round before.
    assert last.verified == last.accepted == (end - 1) % 8 + 1 < 7
    assert driver.engine.metrics.spec_decode_num_verified_tokens_total.value == 7 * len(driver.records)


def test_log_probs_are_the_targets(speculating, golden_artifacts):
    wanted, _ = golden_request("qwen3_vanilla", log_probs=True)
    plain = Driver(golden_artifacts["qwen3_vanilla"]).run(wanted)[0].log_probs()
    assert speculating(policy="fixed:64").run(wanted)[0].log_probs() == plain


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    ],
)
def test_penalties_act_position_by_position(speculating, golden_artifacts, options):
    wanted, _ = golden_request("qwen3_vanilla", **options)
    plain = Driver(golden_artifacts["qwen3_vanilla"]).run(wanted)[0].tokens()
    driver = speculating(policy="fixed:64")
    assert driver.run(wanted)[0].tokens() == plain
    assert sum(record.accepted for record in driver.records) > 0


def test_context_filled_to_the_last_position(speculating):
    driver = speculating(policy="fixed:64", max_context=64)
    (sink,) = driver.run(ids(*prompt(5, 40), max_tokens=100))
    assert len(sink.tokens()) == 24


def test_a_growing_sequence_finds_room_once(speculating, monkeypatch):
    """Around the step from 128 rows to 192 there is room for what is drafted behind, but not for drafts and those."""
    driver = speculating(policy="fixed:64")
    capacities, inner = [], driver.stage.allocate
    monkeypatch.setattr(driver.stage, "allocate", lambda *sizes: (capacities.append(sizes[1]), inner(*sizes)))
    driver.run(ids(*prompt(2, 100), max_tokens=60))
    assert capacities == [192]


def test_the_drafter_is_skipped_where_it_does_not_pay(speculating):
    wanted, golden = golden_request("qwen3_vanilla")
    dear = speculating(cost=DEAR, policy="causal")
    assert dear.run(wanted)[0].tokens() == golden["greedy"].tolist()
    cheap = speculating(cost=CHEAP, policy="causal")
    cheap.run(wanted)
    metrics, other = dear.engine.metrics, cheap.engine.metrics
    assert metrics.spec_decode_drafter_skips_total.value > 40
    # What was drafted to find out is there, and may be worth verifying.
    assert metrics.spec_decode_num_verified_tokens_total.value <= 5
    # It looks again from time to time, so that it notices when drafting begins to pay.
    assert 2 <= metrics.spec_decode_num_drafts_total.value <= 5
    assert other.spec_decode_num_verified_tokens_total.value > 10


def test_sequences_that_wait_look_again_together(speculating, monkeypatch):
    """A drafting round of six costs little more than one of one: requests that began apart share it."""
    driver = speculating(cost=DEAR, policy="causal")
    sizes = []
    inner = driver.drafter.draft
    monkeypatch.setattr(driver.drafter, "draft", lambda batch: sizes.append(len(batch.anchors)) or inner(batch))
    sinks = [KeepingSink() for _ in range(6)]
    for number, sink in enumerate(sinks):
        driver.submit(ids(*prompt(number, 8), max_tokens=110, ignore_eos=True), sink)
        for _ in range(4):
            driver.engine.step()
    while not driver.engine.idle:
        driver.engine.step()
    assert all(len(sink.tokens()) == 110 for sink in sinks)
    # The very first request asks because nothing is known; then all of them, twice in a hundred rounds.
    assert sizes == [1, 6, 6]


def test_metrics_add_up(speculating):
    driver = speculating(policy="fixed:3")
    sinks = driver.run(*(golden_request("qwen3_vanilla", max_tokens=40)[0] for _ in range(4)))
    metrics = driver.engine.metrics
    usages = [sink.deltas[-1].usage for sink in sinks]
    assert metrics.spec_decode_num_draft_tokens_total.value == sum(usage.draft_tokens for usage in usages)
    assert metrics.spec_decode_num_verified_tokens_total.value == sum(usage.verified_draft_tokens for usage in usages)
    accepted = sum(usage.accepted_draft_tokens for usage in usages)
    assert metrics.spec_decode_num_accepted_tokens_total.value == accepted
    by_place = [counter.value for counter in metrics.spec_decode_num_accepted_tokens_per_pos_total]
    assert sum(by_place) == accepted and by_place == sorted(by_place, reverse=True) and by_place[3:] == [0] * 4
    tokens = metrics.step_tokens_total.value
    assert tokens == sum(usage.rounds for usage in usages) + metrics.spec_decode_num_verified_tokens_total.value
    assert metrics.predicted_step_seconds_total.value > 0
    assert 0 <= metrics.spec_decode_calibration_error.value <= 1


def test_a_failing_drafter_costs_those_that_draft(speculating, monkeypatch):
    driver = speculating()
    calls = []

    def fail(batch):
        calls.append(batch)
        raise RuntimeError("no draft today")

    monkeypatch.setattr(driver.drafter, "draft", fail)
    off, golden = golden_request("qwen3_vanilla", draft_policy="off")
    drafting, _ = golden_request("qwen3_vanilla", draft_policy="fixed:3")
    plain, lost = driver.run(off, drafting)
    assert calls and plain.tokens() == golden["greedy"].tolist()
    assert isinstance(lost.failure, InternalError) and "no draft today" in str(lost.failure)
    assert not driver.engine.cache.active
    monkeypatch.undo()
    assert driver.run(drafting)[0].tokens() == golden["greedy"].tolist()


def test_a_failing_drafter_spares_those_that_rest(speculating, monkeypatch):
    """Of an adaptive policy, in a round in which they do not draft: nothing of theirs was in the drafter's hands."""
    driver = speculating(cost=DEAR, policy="causal")
    wanted, golden = golden_request("qwen3_vanilla", max_tokens=40)
    _, resting = driver.submit(wanted)
    for _ in range(10):
        driver.engine.step()

    def fail(batch):
        assert len(batch.anchors) == 1
        raise RuntimeError("no draft today")

    monkeypatch.setattr(driver.drafter, "draft", fail)
    (lost,) = driver.run(ids(*prompt(3, 9), max_tokens=40, draft_policy="fixed:3"))
    assert isinstance(lost.failure, InternalError) and "no draft today" in str(lost.failure)
    assert resting.tokens() == golden["greedy"][:40].tolist()


class Poison:
    """A target for which one token gives NaN, as one may in half precision, and a drafter that proposes it once."""

    def __init__(self, driver: SpeculatingDriver, token: int, drafts: list[int], at: int) -> None:
        self.found = 0
        self._driver, self._token, self._drafts, self._at, self._rounds = driver, token, drafts, at, 0
        self._step, self._draft = driver.stage.step, driver.drafter.draft
        driver.stage.step, driver.drafter.draft = self.step, self.draft

    def step(self, batch):
        output = self._step(batch)
        for place in np.flatnonzero(batch.token_ids == self._token).tolist():
            self.found += 1
            segment = batch.layout.segment_of[place]
            for behind in range(place, batch.offsets[segment + 1]):
                for array in self._driver.stage._cache.arrays:
                    array[batch.slots[segment], :, batch.positions[behind]] = np.nan
                row = np.flatnonzero(batch.logit_rows == behind)
                output.logits[row] = output.top_logit[row] = np.nan
        return output

    def draft(self, batch):
        """Verified in this one round only, under threshold."""
        output = self._draft(batch)
        self._rounds += 1
        tokens, confidence = output.tokens.copy(), np.full_like(output.confidence_logits, -30.0)
        if self._rounds == self._at:
            tokens[0, : len(self._drafts)], confidence[0] = self._drafts, 30.0
        return replace(output, tokens=tokens, confidence_logits=confidence)


@pytest.mark.parametrize("leaves", [False, True])
def test_what_a_rejected_draft_left_in_the_cache_reaches_nobody(speculating, leaves):
    wanted, golden = golden_request("qwen3_vanilla", draft_policy="threshold:0.5")
    answer = golden["greedy"].tolist()
    driver = speculating()
    bad = next(token for token in range(300) if token not in {*golden["prompt"].tolist(), *answer})
    # The first draft falls already, so that nothing is ever asked of the others.
    poison = Poison(driver, bad, [(answer[3] + 1) % 300, 1, 1, 1, 1, bad], at=3)
    state, sink = driver.submit(wanted)
    while not poison.found:
        driver.engine.step()
    state.cancelled = leaves
    (other,) = driver.run(ids(*prompt(3, 9), max_tokens=10, draft_policy="off"))
    assert len(other.tokens()) == 10
    assert leaves or sink.tokens() == answer


def test_the_row_of_an_end_that_is_not_finite_is_not_reused(golden_artifacts, golden_drafters, tmp_path):
    """A draft that ends the sequence is not asked what follows it."""
    wanted, golden = golden_request("qwen3_vanilla", draft_policy="threshold:0.5")
    text, answer = golden["prompt"].tolist(), golden["greedy"].tolist()
    verifier = artifacts.variant(golden_artifacts["qwen3_vanilla"], tmp_path / "ends", eos_token_ids=[answer[4]])
    driver = SpeculatingDriver(verifier, golden_drafters["qwen3_vanilla"])
    Poison(driver, answer[4], answer[2:9], at=2)
    (sink,) = driver.run(replace(wanted, ignore_eos=False))
    assert sink.tokens() == answer[:5]
    driver.stage.step = driver.stage.__class__.step.__get__(driver.stage)
    longer = ids(*text, *answer[:5], 7, max_tokens=5, draft_policy="off")
    assert driver.run(longer)[0].tokens() == Driver(verifier).run(longer)[0].tokens()
    assert driver.engine.metrics.prefix_cache_hit_tokens_total.value == len(text) + 4


def test_policies_are_checked(speculating, golden_artifacts):
    with pytest.raises(InvalidRequest, match="draft_policy: expected off, fixed:N"):
        speculating().submit(golden_request("qwen3_vanilla", draft_policy="fastest")[0])
    with pytest.raises(InvalidRequest, match="draft_policy: expected off, this server runs without a drafter"):
        Driver(golden_artifacts["qwen3_vanilla"]).submit(golden_request("qwen3_vanilla", draft_policy="causal")[0])


def test_a_cost_model_that_proves_wrong_is_forgotten(golden_artifacts, golden_drafters, tmp_path, caplog):
    cache = CostCache(tmp_path, "0" * 64)
    cache.store(CHEAP)
    driver = SpeculatingDriver(
        golden_artifacts["qwen3_vanilla"], golden_drafters["qwen3_vanilla"], policy="fixed:1", cost_cache=cache
    )
    # CHEAP speaks of seconds; these steps take about a millisecond.
    driver.run(golden_request("qwen3_vanilla")[0])
    assert cache.load() is not None
    for _ in range(6):
        driver.run(golden_request("qwen3_vanilla")[0])
    assert cache.load() is None
    assert "the next load measures again" in caplog.text


def test_a_seed_decides_where_depths_are_a_requests_own(speculating):
    """Under an adaptive engine a seeded sampled request gets a policy of its own; one that insists has no seed."""
    seeded, _ = golden_request("qwen3_vanilla", temperature=1.0, seed=3)
    insisting, _ = golden_request("qwen3_vanilla", temperature=1.0, seed=3, draft_policy="causal")
    driver = speculating(policy="causal")
    alone = speculating(policy="lagged").run(seeded)[0].tokens()
    batch = driver.run(seeded, *mixed_requests(), seeded, insisting, insisting)
    assert batch[0].tokens() == batch[-3].tokens() == alone
    assert batch[-1].tokens() != batch[-2].tokens()
    greedy = golden_request("qwen3_vanilla", seed=3)[0]
    assert driver.preparer.prepare(greedy).policy.adaptive
    assert driver.preparer.prepare(insisting).policy.adaptive


def test_no_drafts_means_no_drafter(speculating, monkeypatch):
    driver = speculating(policy="causal", prefill_chunk=50)
    monkeypatch.setattr(driver.drafter, "commit_context", None)
    monkeypatch.setattr(driver.drafter, "draft", None)
    (sink,) = driver.run(ids(*prompt(3, 400), max_tokens=5, max_draft_tokens=0))
    assert len(sink.tokens()) == 5


def test_a_failing_context_commit_costs_its_request_alone(speculating, monkeypatch):
    driver = speculating(policy="fixed:2", prefill_chunk=100, prefill_chunk_busy=100)

    def fail(rows):
        raise RuntimeError("no context today")

    monkeypatch.setattr(driver.drafter, "commit_context", fail)
    off, golden = golden_request("qwen3_vanilla", draft_policy="off")
    plain, lost = driver.run(off, ids(*prompt(3, 400), max_tokens=10))
    assert plain.tokens() == golden["greedy"].tolist()
    assert isinstance(lost.failure, InternalError) and "no context today" in str(lost.failure)
    assert not driver.engine.cache.active
