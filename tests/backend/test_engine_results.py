"""What the engine hands out: draws, log-probabilities, several sequences, reuse, streams, metrics."""

from __future__ import annotations

import numpy as np
import pytest
from engines import Driver, alone, ids, mixed_requests, prompt
from schedules import plain_logits

from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


@pytest.fixture(scope="module")
def artifact(golden_artifacts):
    return golden_artifacts["qwen3_rnn"]


@pytest.fixture
def driver(artifact) -> Driver:
    return Driver(artifact)


class TestSampling:
    def test_seeds_alone_and_in_company(self, artifact):
        requests = [ids(*PROMPT, max_tokens=20, temperature=1.0, seed=seed) for seed in (1, 2, 1)]
        sinks = Driver(artifact).run(*requests)
        first, second, again = (sink.tokens() for sink in sinks)
        assert first == again == alone(artifact, requests[0]).tokens()
        assert first != second

    def test_without_a_seed_answers_differ(self, artifact):
        sinks = Driver(artifact).run(*[ids(*PROMPT, max_tokens=20, temperature=1.0)] * 2)
        assert sinks[0].tokens() != sinks[1].tokens()

    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4, "top_k": 5}, {"repetition_penalty": 1.3}])
    def test_log_probs_are_those_of_the_raw_logits(self, artifact, options):
        (sink,) = Driver(artifact).run(ids(*PROMPT, max_tokens=15, log_probs=True, **options))
        tokens = [*PROMPT, *sink.tokens()]
        logits = plain_logits(OnnxRuntimeVerifier(artifact, 1), tokens).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        expected = [log_softmax[len(PROMPT) - 1 + i, token] for i, token in enumerate(sink.tokens())]
        np.testing.assert_allclose(sink.log_probs(), expected, rtol=0, atol=1e-6)

    def test_no_log_probs_unless_asked(self, driver):
        (sink,) = driver.run(ids(*PROMPT, max_tokens=5))
        assert sink.log_probs() == []


class TestSeveralSequences:
    def test_siblings_share_the_prompt(self, artifact):
        wanted = prompt(7, 40)
        driver = Driver(artifact)
        (sink,) = driver.run(ids(*wanted, max_tokens=10, temperature=1.0, seed=5, num_sequences=4))
        assert driver.engine.metrics.prefix_cache_hit_tokens_total.value == 3 * 39
        answers = [sink.tokens(index) for index in range(4)]
        assert len({tuple(answer) for answer in answers}) > 1
        assert sink.ends == 1 and [len(answer) for answer in answers] == [10] * 4
        unshared = Driver(artifact, prefix_reuse=False)
        (plain,) = unshared.run(ids(*wanted, max_tokens=10, temperature=1.0, seed=5, num_sequences=4))
        assert unshared.engine.metrics.prefix_cache_hit_tokens_total.value == 0
        assert [plain.tokens(index) for index in range(4)] == answers

    def test_more_sequences_than_slots(self, artifact):
        (sink,) = Driver(artifact, max_slots=4, kv_budget_mib=1).run(
            ids(*prompt(7, 200), max_tokens=20, temperature=1.0, seed=5, num_sequences=4)
        )
        assert [len(sink.tokens(index)) for index in range(4)] == [20] * 4

    def test_greedy_siblings_agree(self, driver):
        (sink,) = driver.run(ids(*PROMPT, max_tokens=10, num_sequences=3))
        assert sink.tokens(0) == sink.tokens(1) == sink.tokens(2)

    def test_usage_of_each(self, driver):
        (sink,) = driver.run(ids(*PROMPT, max_tokens=10, num_sequences=2))
        for index in range(2):
            *early, final = sink.of(index)
            assert all(delta.usage is None and delta.finish_reason is None for delta in early)
            usage = final.usage
            assert (usage.input_tokens, usage.output_tokens, usage.rounds) == (len(PROMPT), 10, 9)
            assert usage.draft_tokens == usage.accepted_draft_tokens == 0 and usage.acceptance_rate == 0
            assert usage.arrival_ns <= usage.first_scheduled_ns <= usage.first_token_ns <= usage.last_token_ns


class TestReuse:
    def test_a_second_turn_starts_from_the_first(self, artifact):
        driver = Driver(artifact)
        (first,) = driver.run(ids(*PROMPT, max_tokens=10))
        turn = (*PROMPT, *first.tokens(), 7, 8)
        (second,) = driver.run(ids(*turn, max_tokens=10))
        # The last token of an answer is never fed.
        assert driver.engine.metrics.prefix_cache_hit_tokens_total.value == len(PROMPT) + 9
        assert second.tokens() == alone(artifact, ids(*turn, max_tokens=10)).tokens()

    def test_conversations_in_turn_do_not_cost_each_other_their_rows(self, artifact):
        driver, texts = Driver(artifact), [prompt(seed, 60) for seed in range(3)]
        reused = driver.engine.metrics.prefix_cache_hit_tokens_total
        for turn in range(3):
            for place, text in enumerate(texts):
                before = reused.value
                (sink,) = driver.run(ids(*text, max_tokens=8))
                # All that was fed in the turn before.
                assert reused.value - before == (len(text) - 3 if turn else 0)
                texts[place] = (*text, *sink.tokens(), 7, 8)

    def test_random_turns_equal_those_without_reuse(self, artifact):
        rng = np.random.default_rng(11)
        driver, plain = Driver(artifact, max_slots=3), Driver(artifact, max_slots=3, prefix_reuse=False)
        stems = [prompt(seed, 120) for seed in range(3)]
        for _ in range(10):
            requests = []
            for _ in range(int(rng.integers(1, 5))):
                stem = stems[int(rng.integers(0, 3))][: int(rng.integers(1, 120))]
                tail = rng.integers(0, 300, int(rng.integers(0, 4))).tolist()
                requests.append(ids(*stem, *tail, max_tokens=int(rng.integers(1, 12))))
            found, expected = driver.run(*requests), plain.run(*requests)
            assert [sink.tokens() for sink in found] == [sink.tokens() for sink in expected]
        assert driver.engine.metrics.prefix_cache_hit_tokens_total.value > 500


class TestStreams:
    def test_a_delta_for_every_token(self, driver):
        (sink,) = driver.run(ids(*PROMPT, max_tokens=6))
        assert [len(delta.token_ids) for delta in sink.deltas] == [1] * 6

    def test_one_delta_without_streaming(self, artifact):
        (sink,) = Driver(artifact).run(ids(*PROMPT, max_tokens=6, stream=False, num_sequences=2))
        assert sorted(delta.sequence_index for delta in sink.deltas) == [0, 1]
        assert sink.tokens() == alone(artifact, ids(*PROMPT, max_tokens=6)).tokens()


class TestMetrics:
    def test_counts_agree(self, artifact):
        driver = Driver(artifact, max_slots=3)
        requests = [*mixed_requests(), ids(*PROMPT, max_tokens=4, num_sequences=3)]
        sinks = driver.run(*requests)
        metrics = driver.engine.metrics
        sequences = sum(wanted.num_sequences for wanted in requests)
        tokens = sum(len(delta.token_ids) for sink in sinks for delta in sink.deltas)
        assert metrics.generation_tokens_total.value == tokens
        assert metrics.prompt_tokens_total.value == sum(len(r.input_ids) * r.num_sequences for r in requests)
        assert metrics.requests_finished_total__length.value == sequences
        assert metrics.requests_finished_total__stop.value == metrics.requests_finished_total__error.value == 0
        # Each sequence's first token comes from prefill, every other one from a verification.
        assert metrics.step_tokens_total.value == tokens - sequences
        for histogram in (
            metrics.time_to_first_token_seconds,
            metrics.e2e_request_latency_seconds,
            metrics.request_queue_time_seconds,
        ):
            assert len(histogram.pending) == sequences and min(histogram.pending) >= 0
        assert len(metrics.time_per_output_token_seconds.pending) == sequences
        assert metrics.num_requests_running.value == metrics.num_requests_waiting.value == 0
        assert metrics.kv_cache_usage_bytes.value == 0
        assert metrics.step_seconds_total.value > 0 and metrics.prefill_seconds_total.value > 0

    def test_gauges_while_running(self, artifact):
        driver = Driver(artifact, max_slots=2)
        for _ in range(5):
            driver.submit(ids(*PROMPT, max_tokens=20))
        driver.engine.step()
        metrics = driver.engine.metrics
        assert (metrics.num_requests_running.value, metrics.num_requests_waiting.value) == (2, 3)
        assert metrics.kv_cache_usage_bytes.value > 0 and metrics.kv_cache_capacity_rows.value == 128

    def test_failures_count_every_sequence(self, driver):
        state, _ = driver.submit(ids(*PROMPT, max_tokens=20, num_sequences=3))
        driver.engine.step()
        state.cancelled = True
        driver.engine.step()
        assert driver.engine.metrics.requests_finished_total__cancelled.value == 3


def test_nothing_grows_over_many_requests(artifact):
    driver = Driver(artifact, max_slots=4)
    engine = driver.engine

    def sizes() -> tuple[int, ...]:
        return (
            len(engine.roster.requests),
            len(engine.roster.waiting),
            len(engine.roster.prefilling),
            len(engine.roster.verifying),
            len(engine.cache._slots),
            engine.cache.capacity,
        )

    rng = np.random.default_rng(3)
    driver.run(*[ids(*PROMPT, max_tokens=3)] * 4)
    before = sizes()
    for _ in range(40):
        batch = [ids(*prompt(int(rng.integers(0, 99)), 8), max_tokens=3, num_sequences=2) for _ in range(6)]
        driver.run(*batch)
        assert sizes() == before
