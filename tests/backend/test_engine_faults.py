"""Faults under the engine: each costs its own requests, and the engine goes on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from engines import Driver, KeepingSink, alone, ids, prompt
from stage_doubles import WrappedStage

from dspark_backend.errors import DSparkError, InternalError
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


@pytest.fixture(scope="module")
def artifact(golden_artifacts):
    return golden_artifacts["qwen3_rnn"]


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
                output.logits[0, 17] = output.top_logit[0] = bad
            return output

        driver.stage.after = spoil
        while not driver.engine.idle:
            driver.engine.step()
        assert isinstance(victim.failure, DSparkError) and "finite" in str(victim.failure)
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
            output.logits[0] = output.top_logit[0] = np.nan
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
        driver = self.driver(artifact)
        _, sink = driver.submit(ids(*prompt(5, 60), max_tokens=30))
        driver.engine.step()
        slot = driver.engine.cache.active[0].index
        for array in driver.stage.inner._cache.arrays:
            array[slot, :, 3] = np.nan
        while not driver.engine.idle:
            driver.engine.step()
        assert sink.failure is not None and "finite" in str(sink.failure)
        self.goes_on(artifact, driver)
        (again,) = driver.run(ids(*prompt(5, 60), max_tokens=5))
        assert again.tokens() == alone(artifact, ids(*prompt(5, 60), max_tokens=5)).tokens()

    @pytest.mark.parametrize(("siblings", "settings"), [(3, {"prefix_reuse": False}), (1, {"prefill_chunk": 64})])
    def test_rows_of_a_prompt_whose_logits_nobody_saw(self, artifact, siblings, settings):
        """Siblings of a sequence that falls with its prompt, and a prompt that is cancelled before its last chunk."""
        driver = self.driver(artifact, **settings)

        def spoil(batch, output):
            for array in driver.stage.inner._cache.arrays:
                array[batch.slots, :, 40] = np.nan
            output.logits[:] = output.top_logit[:] = np.nan
            return output

        driver.stage.after = spoil
        state, sink = driver.submit(ids(*prompt(5, 60 if siblings > 1 else 100), max_tokens=5, num_sequences=siblings))
        driver.engine.step()
        state.cancelled = True
        driver.engine.step()
        assert sink.failure is not None
        driver.stage.after = lambda batch, output: output
        others = driver.run(*[ids(*prompt(seed, 9), max_tokens=10) for seed in range(6, 9)])
        assert [len(other.tokens()) for other in others] == [10, 10, 10]

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


@pytest.mark.parametrize("rounds_before", [0, 3])
def test_neighbours_of_a_poisoned_sequence_lose_nothing(artifact, rounds_before):
    """The victim stands before them in the batch: their rows of that very step are not committed yet when it falls."""
    driver = TestFaults.driver(artifact)
    neighbours = [ids(*prompt(index, 9 + index), max_tokens=60, log_probs=True) for index in (1, 2)]
    _, victim = driver.submit(ids(*PROMPT, max_tokens=60))
    sinks = [driver.submit(one)[1] for one in neighbours]
    for _ in range(rounds_before):
        driver.engine.step()

    def poison(batch, output):
        driver.stage.after = lambda _, unchanged: unchanged
        output.logits[0] = output.top_logit[0] = math.nan
        return output

    driver.stage.after = poison
    while not driver.engine.idle:
        driver.engine.step()
    assert isinstance(victim.failure, InternalError)
    for wanted, sink in zip(neighbours, sinks, strict=True):
        expected = alone(artifact, wanted)
        assert sink.tokens() == expected.tokens()
        assert sink.log_probs() == expected.log_probs()
