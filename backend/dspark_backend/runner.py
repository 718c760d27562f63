"""The engine's thread: takes requests from any thread, steps while there is work, sleeps while there is none."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from dspark_backend.calibration import load_calibration
from dspark_backend.config import EngineConfig
from dspark_backend.cost_cache import CostCache, default_cache_directory, fingerprint, load_or_measure
from dspark_backend.engine import Engine
from dspark_backend.errors import InvalidRequest, QueueFull
from dspark_backend.metrics import EngineMetrics
from dspark_backend.preparation import Preparer
from dspark_backend.profile_grid import ProfilePlan
from dspark_backend.request import GenerationRequest
from dspark_backend.sequence import RequestState, Sink
from dspark_backend.speculation import Drafting
from dspark_backend.stages.artifact import VerifierArtifact
from dspark_backend.stages.protocol import DrafterStage, VerifierStage
from dspark_backend.stages.registry import open_drafter, open_verifier
from dspark_backend.stages.tensorrt.limits import check_engines
from dspark_backend.telemetry import RoundObserver
from dspark_backend.tokenizer import Tokenizer, TokenizerSettings

logger = logging.getLogger(__name__)


class EngineRunner:
    """An engine with its thread. All methods may be called from any thread."""

    def __init__(
        self,
        stage: VerifierStage,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        drafting: Drafting | None = None,
        observer: RoundObserver | None = None,
    ) -> None:
        self._stages: list[VerifierStage | DrafterStage] = [stage]
        if drafting is not None:
            self._stages.append(drafting.drafter)
        self._config = config
        self._engine = Engine(stage, tokenizer, config, drafting, observer)
        self._preparer = Preparer(
            stage.artifact,
            tokenizer,
            self._engine.cache.max_context,
            config.max_slots,
            config.default_max_tokens,
            config.max_prompt_bytes,
            config.depth_policy if drafting is not None else None,
        )
        self._inbox: deque[RequestState] = deque()
        self._wake = threading.Condition()
        self._accepting = True
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, config: EngineConfig, observer: RoundObserver | None = None) -> EngineRunner:
        """Load the artifacts that the settings name, and start.

        Raises:
            ArtifactError: an artifact is missing, corrupt or does not fit.
            DSparkError: the settings do not fit the artifact.
        """
        verifier = open_verifier(config.verifier, config.stages)
        if config.drafter is None:
            check_engines(verifier.artifact, None, config.max_slots, config.prefill_chunk)
        drafting = load_drafting(config, verifier) if config.drafter is not None else None
        return cls(verifier, load_tokenizer(config, verifier.artifact), config, drafting, observer)

    @property
    def metrics(self) -> EngineMetrics:
        return self._engine.metrics

    def submit(self, request: GenerationRequest, sink: Sink) -> RequestState:
        """Check and queue a request; its results go to ``sink``, on the engine's thread.

        Raises:
            InvalidRequest: it can never succeed.
            QueueFull: too many wait already, or the engine is stopping.
        """
        arrival = time.time_ns()
        try:
            prepared = self._preparer.prepare(request)
        except InvalidRequest:
            self.count_invalid()
            raise
        state = RequestState(prepared, sink, arrival)
        limit = self._config.max_queue_size
        with self._wake:
            if not self._accepting:
                self.metrics.requests_finished_total__rejected.add(request.num_sequences)
                raise QueueFull("the server is shutting down; try another one")
            # What came since the last step waits only as far as there is no slot for it.
            waiting = max(0, len(self._inbox) - self._engine.num_free) + self._engine.num_waiting
            if waiting >= limit:
                self.metrics.requests_finished_total__rejected.add(request.num_sequences)
                raise QueueFull(
                    f"queue: expected fewer than {limit} waiting requests (max_queue_size), there are {waiting}; "
                    "try again later"
                )
            self._inbox.append(state)
            self._wake.notify()
        return state

    def count_invalid(self) -> None:
        """A request was refused before it could be queued."""
        with self._wake:
            self.metrics.requests_finished_total__invalid.add()

    def cancel(self, state: RequestState) -> None:
        """End a request early; its sink hears RequestCancelled unless it finished first."""
        state.cancelled = True

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for so long, fail the rest, end the thread."""
        with self._wake:
            self._accepting = False
        deadline = time.monotonic() + drain_seconds
        while time.monotonic() < deadline:
            with self._wake:
                if self._engine.idle and not self._inbox:
                    break
            time.sleep(0.02)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        for stage in self._stages:
            stage.close()

    def _run(self) -> None:
        engine = self._engine
        while True:
            with self._wake:
                while not (self._inbox or self._stopping) and engine.idle:
                    self._wake.wait()
                # Under the lock, so that a draining stop() sees a request in the inbox or in the engine.
                while self._inbox:
                    engine.submit(self._inbox.popleft())
                stopping = self._stopping
            try:
                if stopping:
                    engine.fail_all(QueueFull("the server is shutting down; try another one"))
                    return
                engine.step()
            except Exception:  # the thread must outlive any defect: a dead engine would hang every client
                logger.exception("an engine step failed")
                self._recover()
                if stopping:
                    return

    def _recover(self) -> None:
        try:
            self._engine.recover()
        except Exception:  # out of memory, perhaps: the next step fails and tries again
            logger.exception("the engine could not be brought back to an empty state")


def load_tokenizer(config: EngineConfig, artifact: VerifierArtifact) -> Tokenizer | None:
    """The artifact's tokenizer; None where it was exported without one.

    Raises:
        ArtifactError: the file is corrupt.
    """
    if "tokenizer.json" not in artifact.files:
        return None
    settings = TokenizerSettings(artifact.bos_token_id, artifact.eos_token_ids, artifact.add_bos)
    return Tokenizer(config.verifier, settings)


def load_drafting(config: EngineConfig, verifier: VerifierStage) -> Drafting:
    """Drafter, calibration and cost model; the last is measured where no cache has it.

    Raises:
        ArtifactError: the drafter is missing, corrupt or of another verifier, or its calibration is damaged.
        ConfigError: engines are built for fewer slots or a smaller chunk of a prompt than the settings say.
    """
    assert config.drafter is not None
    drafter = open_drafter(config.drafter, config.verifier, config.stages)
    artifact = drafter.artifact
    check_engines(verifier.artifact, artifact, config.max_slots, config.prefill_chunk)
    calibration = load_calibration(config.drafter, artifact.block_size, artifact.source_hash)
    plan = ProfilePlan(max_slots=config.max_slots, max_seconds=config.profile_seconds)
    key = fingerprint(verifier.artifact, artifact, config.threads, plan, config.provider)
    cache = CostCache(config.cost_cache or default_cache_directory(), key)

    def log_progress(what: str, done: float) -> None:
        logger.info("cost model: %s, %.0f%%", what, 100 * done)

    cost = load_or_measure(cache, verifier, drafter, plan, log_progress)
    return Drafting(drafter, calibration, cost, cache)
