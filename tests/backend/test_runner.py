"""The engine with its thread."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from engines import Driver, KeepingSink, ids, open_runner
from stage_doubles import WrappedStage

from dspark_backend.config import EngineConfig
from dspark_backend.errors import (
    ArtifactError,
    DeadlineExceeded,
    DSparkError,
    InternalError,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
)
from dspark_backend.runner import EngineRunner
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


@pytest.fixture(scope="module")
def artifact(golden_artifacts):
    return golden_artifacts["qwen3_vanilla"]


@pytest.fixture
def runner(artifact):
    made = open_runner(artifact)
    yield made
    made.stop()


class Gate:
    """A real stage that waits before each step until it may go on."""

    def __init__(self, artifact, **settings) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.stage = WrappedStage(OnnxRuntimeVerifier(artifact, 1), before=self._wait)
        config = EngineConfig(verifier=artifact, **{"threads": 1, "kv_budget_mib": 64} | settings)
        self.runner = EngineRunner(self.stage, None, config)

    def _wait(self, batch) -> None:
        self.entered.set()
        assert self.open.wait(30)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_) -> None:
        self.open.set()
        self.runner.stop()


def submit(runner: EngineRunner, *tokens: int, **options) -> tuple:
    sink = KeepingSink()
    return runner.submit(ids(*(tokens or PROMPT), **options), sink), sink


def test_many_threads(artifact, runner):
    expected = {seed: Driver(artifact).run(ids(*PROMPT, seed, max_tokens=12))[0].tokens() for seed in range(8)}
    found: dict[int, list[int]] = {}

    def client(seed: int) -> None:
        _, sink = submit(runner, *PROMPT, seed, max_tokens=12)
        found[seed] = sink.wait().tokens()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_sleeps_while_idle(runner):
    submit(runner, max_tokens=3)[1].wait()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert len(submit(runner, max_tokens=3)[1].wait().tokens()) == 3


def test_cancel(artifact):
    with Gate(artifact) as gate:
        state, sink = submit(gate.runner, max_tokens=400, ignore_eos=True)
        gate.entered.wait(10)
        gate.runner.cancel(state)
        gate.open.set()
        assert isinstance(sink.wait().failure, RequestCancelled)
        assert len(sink.deltas) < 5


def test_deadline(artifact):
    with Gate(artifact) as gate:
        _, sink = submit(gate.runner, max_tokens=400, ignore_eos=True, timeout_ms=30)
        gate.entered.wait(10)
        time.sleep(0.05)
        gate.open.set()
        assert isinstance(sink.wait().failure, DeadlineExceeded)


def test_queue_full(artifact):
    with Gate(artifact, max_slots=1, max_queue_size=2) as gate:
        _, running = submit(gate.runner, max_tokens=3)
        gate.entered.wait(10)
        waiting = [submit(gate.runner, max_tokens=3)[1] for _ in range(2)]
        with pytest.raises(QueueFull, match=r"expected fewer than 2 waiting requests \(max_queue_size\), there are 2"):
            submit(gate.runner, max_tokens=3)
        assert gate.runner.metrics.requests_finished_total__rejected.value == 1
        gate.open.set()
        assert [len(sink.wait().tokens()) for sink in (running, *waiting)] == [3, 3, 3]
        assert len(submit(gate.runner, max_tokens=3)[1].wait().tokens()) == 3


def test_invalid_requests_do_not_queue(runner):
    with pytest.raises(InvalidRequest, match="input_ids: expected ids from 0 to"):
        submit(runner, 100_000)


class TestStop:
    def test_drains(self, artifact):
        gate = Gate(artifact)
        _, running = submit(gate.runner, max_tokens=20)
        gate.entered.wait(10)
        _, waiting = submit(gate.runner, max_tokens=20)
        gate.open.set()
        gate.runner.stop(drain_seconds=30)
        assert len(running.tokens()) == len(waiting.tokens()) == 20
        assert gate.stage.closed == 1

    def test_fails_what_does_not_end_in_time(self, artifact):
        gate = Gate(artifact)
        _, sink = submit(gate.runner, max_tokens=400)
        gate.entered.wait(10)
        stopper = threading.Thread(target=gate.runner.stop, args=(0.05,))
        stopper.start()
        time.sleep(0.2)
        gate.open.set()
        stopper.join(10)
        assert not stopper.is_alive()
        assert isinstance(sink.wait(1).failure, QueueFull) and "shutting down" in str(sink.failure)

    def test_refuses_new_requests(self, artifact):
        runner = open_runner(artifact)
        runner.stop()
        with pytest.raises(QueueFull, match="shutting down"):
            submit(runner)
        runner.stop()

    def test_ends_its_thread(self, artifact):
        before = threading.active_count()
        runner = open_runner(artifact)
        submit(runner, max_tokens=2)[1].wait()
        runner.stop()
        assert threading.active_count() == before


class TestDefects:
    """Whatever goes wrong in a step, the thread lives, and later requests are served right."""

    def check(self, artifact, gate: Gate) -> None:
        _, sink = submit(gate.runner, max_tokens=5)
        assert sink.wait().tokens() == Driver(artifact).run(ids(*PROMPT, max_tokens=5))[0].tokens()

    def test_a_step_of_the_stage_raises(self, artifact):
        with Gate(artifact) as gate:
            gate.open.set()
            gate.stage.before = lambda batch: (_ for _ in ()).throw(RuntimeError("broken kernel"))
            _, sink = submit(gate.runner, max_tokens=5)
            assert isinstance(sink.wait().failure, InternalError) and "broken kernel" in str(sink.failure)
            gate.stage.before = lambda batch: None
            self.check(artifact, gate)

    @pytest.mark.parametrize("times", [1, 3])
    def test_the_cache_cannot_grow(self, artifact, times):
        with Gate(artifact) as gate:
            gate.open.set()
            real, left = gate.stage.inner.allocate, [times]

            def allocate(num_slots, capacity, moves):
                if left[0]:
                    left[0] -= 1
                    raise MemoryError("no memory")
                real(num_slots, capacity, moves)

            gate.stage.inner.allocate = allocate
            for _ in range(4):
                tokens = np.arange(200) % 300
                submit(gate.runner, *tokens.tolist(), max_tokens=5)[1].wait()
            assert left == [0]
            self.check(artifact, gate)

    def test_an_error_in_the_engine_itself(self, artifact):
        with Gate(artifact) as gate:
            gate.open.set()
            engine = gate.runner._engine
            real = engine._prefill
            engine._prefill = lambda: (_ for _ in ()).throw(ZeroDivisionError("a defect"))
            _, sink = submit(gate.runner, max_tokens=5)
            assert isinstance(sink.wait().failure, InternalError)
            assert "a defect" not in str(sink.failure)
            engine._prefill = real
            self.check(artifact, gate)


class TestOpen:
    def test_no_artifact(self, tmp_path):
        with pytest.raises(ArtifactError, match="expected an exported verifier"):
            open_runner(tmp_path)

    def test_budget_below_one_sequence(self, text_artifact, artifact, tmp_path):
        stage = OnnxRuntimeVerifier(artifact, 1)
        config = EngineConfig(verifier=artifact)
        object.__setattr__(config, "kv_budget_mib", 0)
        with pytest.raises(DSparkError, match="kv_budget_mib"):
            EngineRunner(stage, None, config)
