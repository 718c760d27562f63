"""The ``dspark`` model in Triton: tensors <-> requests, metrics -> Triton's own endpoint.

One thread of this module talks to Triton after load: it sends responses, watches for clients that went away and
publishes metrics. Triton's Python backend crashes when metrics are updated from several threads, and a ``send`` takes
long enough (0.1-0.3 ms) to be kept off the engine's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton_python_backend_utils as pb_utils

from dspark_backend.config import EngineConfig
from dspark_backend.delta import Delta
from dspark_backend.errors import DSparkError, InternalError, InvalidRequest
from dspark_backend.metrics import Counter, EngineMetrics, Gauge, Histogram
from dspark_backend.outbox import Outbox, Parcel
from dspark_backend.request import GenerationRequest
from dspark_backend.roster import SEE_LOG
from dspark_backend.runner import EngineRunner
from dspark_backend.sequence import RequestState
from dspark_backend.triton_common import model_folder, read_parameters, triton_error
from dspark_backend.wire import Collector, parse_request, render

logger = logging.getLogger(__name__)

_DRAIN_SECONDS = 3.0
_CANCEL_POLL_SECONDS = 0.05


def _guarded(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:  # see _talk
        logger.exception("the sending thread met an error")


def _respond(call: _Call, result: list[Delta] | DSparkError, last: bool) -> None:
    if isinstance(result, DSparkError):
        response = pb_utils.InferenceResponse(error=triton_error(result))
    else:
        tensors = [pb_utils.Tensor(name, array) for name, array in render(result).items()]
        response = pb_utils.InferenceResponse(tensors)
    call.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)


@dataclass(eq=False)
class _Call:
    """One request on its way through: implements :class:`~dspark_backend.sequence.Sink`."""

    sender: Any
    collector: Collector
    outbox: Outbox[_Call]
    state: RequestState | None = None
    lost: bool = False
    """A response could not be sent, and an error took its place: nothing may follow."""

    def delta(self, delta: Delta, last: bool) -> None:
        deltas = self.collector.take(delta, last)
        if deltas:
            self.outbox.put(Parcel(self, deltas, last))

    def error(self, error: DSparkError) -> None:
        self.outbox.put(Parcel(self, error, True))


class DSparkModel:
    """``TritonPythonModel`` of the ``dspark`` model: decoupled."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load artifacts and start the engine. Triton shows the message of what is raised here."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        try:
            config = EngineConfig.from_parameters(read_parameters(args), model_folder(args))
            self._runner = EngineRunner.open(config)
        except DSparkError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._outbox: Outbox[_Call] = Outbox()
        self._open: set[_Call] = set()
        publisher = MetricsPublisher(
            self._runner.metrics, {"model": args["model_name"], "version": args["model_version"]}
        )
        self._thread = threading.Thread(
            target=self._talk, args=(publisher, config.metrics_interval_ms / 1000), name="dspark-triton", daemon=True
        )
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Hand requests to the engine; answers come from the sending thread."""
        for request in requests:
            self._accept(request)

    def finalize(self) -> None:
        """Let running requests finish for a moment, then stop."""
        self._runner.stop(_DRAIN_SECONDS)
        self._outbox.close()
        self._thread.join()

    def _accept(self, request: Any) -> None:
        call = _Call(request.get_response_sender(), Collector(stream=False), self._outbox)
        # Before submitting: the sending thread may take it out again at once.
        self._open.add(call)
        try:
            parsed = self._parse(request)
            call.collector = Collector(parsed.stream)
            call.state = self._runner.submit(parsed, call)
        except DSparkError as error:
            call.error(error)
            return
        except Exception:  # a defect must cost this request alone
            logger.exception("a request could not be read")
            call.error(InternalError(SEE_LOG))

    def _parse(self, request: Any) -> GenerationRequest:
        try:
            return parse_request({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        except InvalidRequest:
            self._runner.count_invalid()
            raise

    def _talk(self, publisher: MetricsPublisher, interval: float) -> None:
        """The sending thread. Nothing may end it: every client would wait for ever."""
        next_poll = next_metrics = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_poll:
                _guarded(self._cancel_abandoned)
                next_poll = now + _CANCEL_POLL_SECONDS
            if now >= next_metrics:
                _guarded(publisher.publish)
                next_metrics = now + interval
            for parcel in self._outbox.take(max(0.0, min(next_poll, next_metrics) - time.monotonic())):
                self._send(parcel.owner, parcel.result, parcel.last)
            if self._outbox.closed:
                _guarded(publisher.publish)
                return

    def _send(self, call: _Call, result: list[Delta] | DSparkError, last: bool) -> None:
        if call.lost:
            return
        try:
            _respond(call, result, last)
        except Exception:  # the other requests' answers must go out
            logger.exception("a response could not be sent")
            call.lost = last = True
            if call.state is not None:
                self._runner.cancel(call.state)
            # An answer with a hole must not look whole, nor a client wait for an end that never comes.
            _guarded(lambda: _respond(call, InternalError(SEE_LOG), True))
        if last:
            self._open.discard(call)

    def _cancel_abandoned(self) -> None:
        for call in list(self._open):
            if call.state is not None and not call.state.cancelled and call.sender.is_cancelled():
                self._runner.cancel(call.state)


class MetricsPublisher:
    """Copies the engine's metrics to Triton's endpoint. To be called from one thread only."""

    def __init__(self, metrics: EngineMetrics, labels: dict[str, str]) -> None:
        self._families: dict[str, Any] = {}
        self._published: list[tuple[Any, Any]] = []
        for name, metric in metrics.items():
            family = pb_utils.MetricFamily
            if name not in self._families:
                kinds = {Counter: family.COUNTER, Gauge: family.GAUGE, Histogram: family.HISTOGRAM}
                self._families[name] = family(name=name, description=metric.doc, kind=kinds[type(metric)])
            options = {"buckets": list(metric.buckets)} if isinstance(metric, Histogram) else {}
            exported = self._families[name].Metric(labels=labels | dict(metric.labels), **options)
            self._published.append((metric, exported))
        self._seen: dict[int, float] = {}

    def publish(self) -> None:
        """Bring Triton's numbers up to date; unchanged ones cost nothing."""
        for index, (metric, exported) in enumerate(self._published):
            if isinstance(metric, Counter | Gauge):
                before, now = self._seen.get(index, 0.0), metric.value
                if now == before:
                    continue
                self._seen[index] = now
                if isinstance(metric, Counter):
                    exported.increment(now - before)
                else:
                    exported.set(now)
            else:
                while metric.pending:
                    exported.observe(metric.pending.popleft())
