"""The engine's loop over a real (tiny) model, stepped by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from artifacts import variant
from engines import Driver, KeepingSink, ids
from schedules import plain_logits
from stage_doubles import WrappedStage

from dspark_backend.delta import FinishReason
from dspark_backend.errors import DeadlineExceeded, InternalError, RequestCancelled
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


@pytest.fixture(scope="module")
def artifact(golden_artifacts):
    return golden_artifacts["qwen3_rnn"]


@pytest.fixture
def driver(artifact) -> Driver:
    return Driver(artifact)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 300, length).tolist())


def alone(artifact, wanted, **settings) -> KeepingSink:
    return Driver(artifact, **settings).run(wanted)[0]


def mixed_requests() -> list:
    requests = []
    for index in range(9):
        options = {"max_tokens": 6 + 5 * index, "seed": index}
        if index % 3 == 1:
            options |= {"temperature": 1.0, "top_p": 0.9}
        if index % 3 == 2:
            options |= {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2, "presence_penalty": 0.3}
        requests.append(ids(*prompt(index, 1 + 23 * index), **options))
    return requests


class TestBatching:
    def test_answers_do_not_depend_on_company(self, artifact):
        requests = mixed_requests()
        together = Driver(artifact, max_slots=4).run(*requests)
        for wanted, sink in zip(requests, together, strict=True):
            assert sink.ends == 1
            assert sink.tokens() == alone(artifact, wanted).tokens()

    def test_joining_and_leaving_midway(self, artifact):
        requests = mixed_requests()
        driver, sinks = Driver(artifact, max_slots=3), []
        for wanted in requests:
            sinks.append(driver.submit(wanted)[1])
            for _ in range(4):
                driver.engine.step()
        while not driver.engine.idle:
            driver.engine.step()
        for wanted, sink in zip(requests, sinks, strict=True):
            assert sink.tokens() == alone(artifact, wanted).tokens()

    @pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
    def test_chunks_of_the_prompt_do_not_matter(self, artifact, chunk):
        wanted = ids(*prompt(1, 130), max_tokens=12, temperature=1.0, seed=3)
        assert alone(artifact, wanted, prefill_chunk=chunk).tokens() == alone(artifact, wanted).tokens()

    def test_a_short_prompt_beside_a_long_sequence(self, artifact):
        """The long one's rows must survive the steps of the short one."""
        long, short = ids(*prompt(1, 300), max_tokens=30), ids(*prompt(2, 5), max_tokens=10)
        driver = Driver(artifact)
        _, first = driver.submit(long)
        for _ in range(5):
            driver.engine.step()
        (second,) = driver.run(short)
        assert first.tokens() == alone(artifact, long).tokens()
        assert second.tokens() == alone(artifact, short).tokens()

    def test_one_token_for_everybody_each_step(self, driver):
        sinks = [driver.submit(ids(*prompt(index, 8), max_tokens=40))[1] for index in range(5)]
        driver.engine.step()
        before = [len(sink.tokens()) for sink in sinks]
        driver.engine.step()
        assert [len(sink.tokens()) for sink in sinks] == [count + 1 for count in before]

    def test_no_more_than_max_slots_at_once(self, artifact):
        driver = Driver(artifact, max_slots=2)
        for index in range(5):
            driver.submit(ids(*prompt(index, 8), max_tokens=5))
        while not driver.engine.idle:
            driver.engine.step()
            assert len(driver.engine.cache.active) <= 2
            assert driver.engine.metrics.num_requests_running.value <= 2

    def test_the_budget_limits_admission(self, artifact):
        stage = OnnxRuntimeVerifier(artifact, 1)
        rows = 2**20 // stage.artifact.cache_bytes_per_token
        driver = Driver(artifact, stage, kv_budget_mib=1, max_slots=64)
        for index in range(40):
            driver.submit(ids(*prompt(index, 100), max_tokens=100))
        driver.engine.step()
        assert len(driver.engine.cache.active) == rows // 256 < 40
        while not driver.engine.idle:
            driver.engine.step()


class TestPrefill:
    @staticmethod
    def widths(driver: Driver, wanted: tuple[int, ...]) -> list[int]:
        """Prompt tokens in each step until the request with this prompt has its first token."""
        found = []
        _, sink = driver.submit(ids(*wanted, max_tokens=2))
        while not sink.deltas:
            start = len(driver.stage.batches)
            driver.engine.step()
            prefill = driver.stage.batches[start]
            found.append(prefill.num_tokens)
        return found

    def wrapped(self, artifact, **settings) -> Driver:
        return Driver(artifact, WrappedStage(OnnxRuntimeVerifier(artifact, 1)), prefix_reuse=False, **settings)

    def test_idle_chunks(self, artifact):
        driver = self.wrapped(artifact, prefill_chunk=64, prefill_chunk_busy=16)
        assert self.widths(driver, prompt(1, 150)) == [64, 64, 22]

    def test_busy_chunks(self, artifact):
        driver = self.wrapped(artifact, prefill_chunk=64, prefill_chunk_busy=16)
        _, streaming = driver.submit(ids(*PROMPT, max_tokens=100))
        driver.engine.step()
        before = len(streaming.tokens())
        assert self.widths(driver, prompt(1, 40)) == [16, 16, 8]
        assert len(streaming.tokens()) == before + 3

    def test_chunk_is_shared_by_prompts(self, artifact):
        driver = self.wrapped(artifact, prefill_chunk=50)
        for index in range(3):
            driver.submit(ids(*prompt(index, 40), max_tokens=2))
        driver.engine.step()
        assert driver.stage.batches[0].num_tokens == 50
        assert len(driver.stage.batches[0].slots) == 2


class TestOrder:
    def test_priority_then_arrival(self, artifact):
        driver, order = Driver(artifact, max_slots=1), []

        class Sink(KeepingSink):
            def delta(self, delta, last):
                order.append(self.name)
                super().delta(delta, last)

        for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 7)):
            sink = Sink()
            sink.name = name
            driver.submit(ids(*PROMPT, max_tokens=1, priority=priority), sink)
        while not driver.engine.idle:
            driver.engine.step()
        assert order == ["high", "first", "second", "low"]


class TestEnds:
    def test_deadline_in_the_queue(self, artifact):
        driver = Driver(artifact, max_slots=1)
        _, running = driver.submit(ids(*PROMPT, max_tokens=50))
        state, waiting = driver.submit(ids(*PROMPT, max_tokens=5, timeout_ms=1000))
        driver.engine.step()
        assert driver.engine.num_waiting == 1
        state.arrival_ns -= 1_001_000_000
        driver.engine.step()
        assert isinstance(waiting.failure, DeadlineExceeded)
        assert "1000 ms" in str(waiting.failure) and waiting.deltas == []
        assert driver.engine.num_waiting == 0 and running.failure is None
        assert driver.engine.metrics.requests_finished_total__deadline.value == 1

    def test_deadline_while_running(self, driver):
        state, sink = driver.submit(ids(*PROMPT, max_tokens=50, timeout_ms=60_000))
        driver.engine.step()
        assert sink.tokens()
        state.arrival_ns -= 60_001_000_000
        driver.engine.step()
        assert isinstance(sink.failure, DeadlineExceeded)
        assert driver.engine.idle and driver.engine.cache.active == []

    @pytest.mark.parametrize("where", ["queue", "prefill", "running"])
    def test_cancel(self, artifact, where):
        driver = Driver(artifact, max_slots=1, prefill_chunk=10)
        if where == "queue":
            other_state, _ = driver.submit(ids(*PROMPT, max_tokens=50))
            driver.engine.step()
        state, sink = driver.submit(ids(*prompt(1, 25), max_tokens=50))
        driver.engine.step()
        if where == "running":
            driver.engine.step()
            driver.engine.step()
            assert len(sink.tokens()) >= 1
        else:
            assert sink.deltas == []
        state.cancelled = True
        driver.engine.step()
        assert isinstance(sink.failure, RequestCancelled) and sink.ends == 1
        if where == "queue":
            assert len(driver.engine.cache.active) == 1
            other_state.cancelled = True
            driver.engine.step()
        assert driver.engine.idle and driver.engine.cache.active == []
        assert driver.engine.metrics.requests_finished_total__cancelled.value == 1 + (where == "queue")

    def test_cancel_after_the_end_changes_nothing(self, driver):
        state, sink = driver.submit(ids(*PROMPT, max_tokens=1))
        driver.engine.step()
        state.cancelled = True
        driver.engine.step()
        assert sink.failure is None and sink.ends == 1

    def test_max_tokens(self, driver):
        (sink,) = driver.run(ids(*PROMPT, max_tokens=7))
        assert len(sink.tokens()) == 7
        assert sink.reason() is FinishReason.LENGTH

    def test_the_context_cuts_max_tokens(self, artifact):
        (sink,) = Driver(artifact, max_context=20).run(ids(*PROMPT, max_tokens=1000))
        assert len(sink.tokens()) == 20 - len(PROMPT)
        assert sink.reason() is FinishReason.LENGTH

    def test_the_whole_context_of_the_model(self, artifact):
        wanted = ids(*prompt(1, 500), max_tokens=1000)
        assert len(alone(artifact, wanted).tokens()) == 512 - 500

    def test_eos(self, artifact, tmp_path):
        free = alone(artifact, ids(*PROMPT, max_tokens=40)).tokens()
        end = free[9]
        model = variant(artifact, tmp_path / "eos", eos_token_ids=[end, 299_999])
        first = free.index(end)
        (sink,) = Driver(model).run(ids(*PROMPT, max_tokens=40))
        assert sink.tokens() == free[: first + 1]
        assert sink.reason() is FinishReason.STOP
        (ignoring,) = Driver(model).run(ids(*PROMPT, max_tokens=40, ignore_eos=True))
        assert ignoring.tokens() == free
        assert ignoring.reason() is FinishReason.LENGTH
        (longer,) = Driver(model).run(ids(*PROMPT, max_tokens=40, min_tokens=first + 5))
        assert end not in longer.tokens()[: first + 5]
        assert longer.tokens()[:first] == free[:first]
        (at_the_limit,) = Driver(model).run(ids(*PROMPT, max_tokens=first + 1))
        assert at_the_limit.reason() is FinishReason.STOP


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


class Broken(RuntimeError):
    """What a runtime may raise."""


class TestFaults:
    @staticmethod
    def driver(artifact, **settings) -> Driver:
        return Driver(artifact, WrappedStage(OnnxRuntimeVerifier(artifact, 1)), **settings)

    def goes_on(self, artifact, driver: Driver) -> None:
        wanted = ids(*PROMPT, max_tokens=8)
        (sink,) = driver.run(wanted)
        assert sink.tokens() == alone(artifact, wanted).tokens()
        assert driver.engine.cache.active == []
        driver.engine.cache.check_integrity()

    def test_a_failing_prefill_spares_those_that_stream(self, artifact):
        driver = self.driver(artifact)
        _, streaming = driver.submit(ids(*PROMPT, max_tokens=8))
        driver.engine.step()

        def fail(batch):
            if batch.num_tokens > 5:
                raise Broken("no memory")

        driver.stage.before = fail
        (broken,) = driver.run(ids(*prompt(1, 20), max_tokens=8))
        assert isinstance(broken.failure, InternalError) and "no memory" in str(broken.failure)
        assert streaming.tokens() == alone(artifact, ids(*PROMPT, max_tokens=8)).tokens()
        assert driver.engine.metrics.requests_finished_total__error.value == 1
        driver.stage.before = lambda batch: None
        self.goes_on(artifact, driver)

    def test_a_failing_verification_spares_those_that_wait(self, artifact):
        driver = self.driver(artifact, max_slots=2)
        sinks = [driver.submit(ids(*prompt(index, 9), max_tokens=8))[1] for index in range(3)]
        driver.engine.step()
        driver.stage.before = lambda batch: (_ for _ in ()).throw(Broken("once"))
        driver.engine.step()
        driver.stage.before = lambda batch: None
        while not driver.engine.idle:
            driver.engine.step()
        assert [sink.failure is not None for sink in sinks] == [True, True, False]
        assert sinks[2].tokens() == alone(artifact, ids(*prompt(2, 9), max_tokens=8)).tokens()
        self.goes_on(artifact, driver)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"log_probs": True}])
    def test_logits_that_are_not_finite_cost_one_request(self, artifact, bad, options):
        driver = self.driver(artifact)
        _, victim = driver.submit(ids(*PROMPT, max_tokens=30, **options))
        _, other = driver.submit(ids(*prompt(1, 9), max_tokens=10))
        driver.engine.step()

        def spoil(batch, output):
            if len(batch.slots) == 2:
                output.logits[0, 17] = bad
            return output

        driver.stage.after = spoil
        while not driver.engine.idle:
            driver.engine.step()
        assert isinstance(victim.failure, InternalError) or "finite" in str(victim.failure)
        assert len(victim.deltas) == 2
        assert other.tokens() == alone(artifact, ids(*prompt(1, 9), max_tokens=10)).tokens()
        driver.stage.after = lambda batch, output: output
        self.goes_on(artifact, driver)

    def test_a_failing_sequence_ends_its_siblings_and_nobody_else(self, artifact):
        driver = self.driver(artifact)
        _, family = driver.submit(ids(*PROMPT, max_tokens=30, num_sequences=3))
        _, other = driver.submit(ids(*prompt(1, 9), max_tokens=10))
        for _ in range(3):
            driver.engine.step()

        def spoil(batch, output):
            output.logits[0] = np.nan
            return output

        driver.stage.after = spoil
        driver.engine.step()
        driver.stage.after = lambda batch, output: output
        while not driver.engine.idle:
            driver.engine.step()
        failed = [sink for sink in (family, other) if sink.failure is not None]
        assert len(failed) == 1 and failed[0].ends == 1
        self.goes_on(artifact, driver)

    def test_poisoned_rows_reach_nobody_else(self, artifact):
        """Real NaN in the cache: masked rows count as 0 * NaN, so a slot's next owner would inherit them."""

        class Poisoned(WrappedStage):
            def copy_rows(self, move):
                super().copy_rows(move)

        stage = Poisoned(OnnxRuntimeVerifier(artifact, 1))
        driver = Driver(artifact, stage)
        _, sink = driver.submit(ids(*prompt(5, 60), max_tokens=30))
        driver.engine.step()
        slot = driver.engine.cache.active[0].index
        for array in cache_arrays(stage.inner):
            array[slot, :, 3] = np.nan
        while not driver.engine.idle:
            driver.engine.step()
        assert sink.failure is not None and "finite" in str(sink.failure)
        self.goes_on(artifact, driver)
        (again,) = driver.run(ids(*prompt(5, 60), max_tokens=5))
        assert again.tokens() == alone(artifact, ids(*prompt(5, 60), max_tokens=5)).tokens()

    def test_a_sink_that_raises_costs_its_request(self, artifact):
        class Deaf(KeepingSink):
            def delta(self, delta, last):
                raise Broken("nobody there")

        driver = self.driver(artifact)
        _, deaf = driver.submit(ids(*PROMPT, max_tokens=8), Deaf())
        _, other = driver.submit(ids(*prompt(1, 9), max_tokens=8))
        while not driver.engine.idle:
            driver.engine.step()
        assert isinstance(deaf.failure, InternalError)
        assert len(other.tokens()) == 8
        self.goes_on(artifact, driver)

    def test_recovery_from_a_failed_allocation(self, artifact):
        driver = self.driver(artifact)
        sinks = [driver.submit(ids(*prompt(index, 200), max_tokens=30))[1] for index in range(2)]
        real = driver.stage.inner.allocate

        def no_memory(num_slots, capacity, moves):
            raise MemoryError("no memory for the cache")

        driver.stage.inner.allocate = no_memory
        with pytest.raises(MemoryError):
            driver.engine.step()
        driver.stage.inner.allocate = real
        driver.engine.recover()
        assert all(isinstance(sink.failure, InternalError) for sink in sinks)
        assert driver.engine.idle
        self.goes_on(artifact, driver)


def cache_arrays(stage: OnnxRuntimeVerifier) -> list[np.ndarray]:
    return stage._cache.arrays


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
            len(engine._requests),
            len(engine._waiting),
            len(engine._prefilling),
            len(engine._verifying),
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
