"""The engine's loop over a real (tiny) model, stepped by hand: batching, prefill, order, ends."""

from __future__ import annotations

import pytest
from artifacts import variant
from engines import Driver, KeepingSink, alone, ids, mixed_requests, prompt
from stage_doubles import WrappedStage

from dspark_backend.delta import FinishReason
from dspark_backend.errors import DeadlineExceeded, RequestCancelled
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


@pytest.fixture(scope="module")
def artifact(golden_artifacts):
    return golden_artifacts["qwen3_rnn"]


@pytest.fixture
def driver(artifact) -> Driver:
    return Driver(artifact)


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

    def test_busy_chunks_grow_with_the_prompts_that_wait(self, artifact):
        driver = self.wrapped(artifact, prefill_chunk=64, prefill_chunk_busy=24)
        driver.submit(ids(*PROMPT, max_tokens=100))
        driver.engine.step()
        for index in range(2):
            driver.submit(ids(*prompt(index, 60), max_tokens=2))
        # Three prompts wait (64 of 72), then two (48), then what is left of the last one.
        assert self.widths(driver, prompt(2, 60)) == [64, 48, 48, 20]

    def test_prompts_in_far_slots_run_apart(self, artifact):
        driver = self.wrapped(artifact, prefill_chunk=200, max_slots=8)
        for index in range(8):
            driver.submit(ids(*prompt(index, 20), max_tokens=2 if index in (0, 7) else 100))
        driver.engine.step()  # the first and the last have ended, and their slots are free
        first = driver.submit(ids(*prompt(8, 40), max_tokens=2))[1]
        last = driver.submit(ids(*prompt(9, 40), max_tokens=2))[1]
        start = len(driver.stage.batches)
        driver.engine.step()
        assert [batch.num_tokens for batch in driver.stage.batches[start : start + 2]] == [40, 40]
        assert first.deltas and last.deltas

    def test_runs_of_a_step_find_room_for_all_of_them(self, artifact, monkeypatch):
        """The cache neither shrinks for a short prompt nor grows again for the long one behind it."""
        driver = self.wrapped(artifact, prefill_chunk=400, prefill_chunk_busy=400, max_slots=8)
        for index in range(8):
            driver.submit(ids(*prompt(index, 20), max_tokens=2 if index in (0, 7) else 100))
        driver.engine.step()
        driver.submit(ids(*prompt(8, 20), max_tokens=2))
        driver.submit(ids(*prompt(9, 300), max_tokens=2))
        allocate, capacities = driver.stage.allocate, []

        def watched(num_slots, capacity, moves):
            capacities.append(capacity)
            allocate(num_slots, capacity, moves)

        monkeypatch.setattr(driver.stage, "allocate", watched)
        start = len(driver.stage.batches)
        driver.engine.step()
        assert [batch.num_tokens for batch in driver.stage.batches[start : start + 2]] == [20, 300]
        assert capacities == [320]

    def test_siblings_of_a_request_wait_as_one_prompt(self, artifact):
        driver = self.wrapped(artifact, prefill_chunk=64, prefill_chunk_busy=24)
        driver.submit(ids(*PROMPT, max_tokens=100))
        driver.engine.step()
        driver.submit(ids(*prompt(1, 60), max_tokens=2, num_sequences=3))
        start = len(driver.stage.batches)
        driver.engine.step()
        assert driver.stage.batches[start].num_tokens == 24

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
