"""Is a server able to infer? Readiness alone does not notice a dead stub, so a tiny real request is made.

Behind a long queue it may get no answer in time. Such a server must neither be restarted nor taken out of service, so
the engine's counters decide whether it is alive: they stand still when the engine or its stub is dead.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from dspark_backend.serving.progress import work_done

DEFAULT_MODEL = "dspark"
PROBE_TOKEN = 1
RETRY_SECS = 0.5
# The adapter starts every error with its status in brackets; only a living model writes this one.
REFUSED = "[UNAVAILABLE]"
SILENT = "gave no answer within"


@dataclass(frozen=True)
class Health:
    """A check's outcome."""

    healthy: bool
    """The model answered the request."""
    alive: bool
    """Healthy, or at work: the model itself refused for lack of room, or made steps or tokens while this check waited.
    Restarting it would not help."""
    reason: str
    """What was seen, for a person."""
    seconds: float


def check(url: str, model: str | None = DEFAULT_MODEL, timeout: float = 10.0, metrics_url: str | None = None) -> Health:
    """Check that the server is ready and that ``model`` answers a request for one token.

    Args:
        url: ``host:port`` of the gRPC service.
        model: a model that speaks the wire contract of ``dspark``; None checks readiness only.
        timeout: seconds for everything but the counters, for which up to 4 more go by.
        metrics_url: where the server's counters are; None does not look at them.
    """
    before = None if model is None or metrics_url is None else work_done(metrics_url, model)
    start = time.monotonic()
    reason = ""
    client = triton.InferenceServerClient(url)
    try:
        reason = _readiness(client, model, timeout)
        if not reason and model is not None:
            reason = _inference(client, model, timeout - (time.monotonic() - start))
    except InferenceServerException as error:
        reason = _describe(error, url, timeout)
    finally:
        client.close()
    seconds = time.monotonic() - start
    if not reason:
        return Health(True, True, f"{model} answered" if model else "the server is ready", seconds)
    if SILENT not in reason or model is None or metrics_url is None:
        return Health(False, REFUSED in reason, reason, seconds)
    alive, seen = _at_work(metrics_url, before, work_done(metrics_url, model))
    return Health(False, alive, f"{reason}{seen}", seconds)


def wait(
    url: str,
    model: str | None = DEFAULT_MODEL,
    timeout: float = 10.0,
    patience: float = 0.0,
    metrics_url: str | None = None,
    live: bool = False,
) -> Health:
    """Check until the outcome is healthy (``live``: alive) or ``patience`` seconds have passed; returns the last."""
    deadline = time.monotonic() + patience
    while True:
        state = check(url, model, timeout, metrics_url)
        if (state.alive if live else state.healthy) or time.monotonic() >= deadline:
            return state
        time.sleep(RETRY_SECS)


def beside(url: str) -> str:
    """Where the metrics of the server at ``url`` (``host:port``) are unless told otherwise: at the next port."""
    host, _, port = url.rpartition(":")
    return f"http://{host}:{int(port) + 1}/metrics" if host and port.isdecimal() else f"http://{url}:8002/metrics"


def _at_work(metrics_url: str, before: float | None, after: float | None) -> tuple[bool, str]:
    """Whether the counters grew, and words that say so."""
    if before is None or after is None:
        return False, f", and {metrics_url} has no counters of it"
    if after > before:
        return True, f", but {after - before:.0f} steps and tokens were made meanwhile"
    return False, ", and its counters stand still"


def _readiness(client: Any, model: str | None, timeout: float) -> str:
    if not client.is_server_ready(client_timeout=timeout):
        return "the server is not ready: models are loading, or one failed to load"
    if model is not None and not client.is_model_ready(model, client_timeout=timeout):
        return f"model {model} is not ready"
    return ""


def _inference(client: Any, model: str, timeout: float) -> str:
    declared = {
        tensor.name: len(tensor.shape)
        for tensor in client.get_model_metadata(model, client_timeout=max(timeout, 0.001)).inputs
    }
    if "input_ids" not in declared or "max_tokens" not in declared:
        return f"model {model} takes no input_ids and max_tokens: not a dspark model"
    inputs = [_tensor("input_ids", PROBE_TOKEN, declared), _tensor("max_tokens", 1, declared)]
    answers: queue.Queue[Any] = queue.Queue()
    deadline = max(timeout, 0.001)
    client.start_stream(lambda result, error: answers.put(error or result), stream_timeout=deadline)
    answered = False
    try:
        client.async_stream_infer(model, inputs)
        answer = answers.get(timeout=deadline)
        answered = True
    except queue.Empty:
        return f"model {model} {SILENT} {timeout:.1f} s"
    finally:
        # A stream that is cancelled while its last answer is on its way can stay open in Triton, which then waits for
        # it when it should stop.
        client.stop_stream(cancel_requests=not answered)
    if isinstance(answer, InferenceServerException):
        if "Deadline Exceeded" in str(answer):
            return f"model {model} {SILENT} {timeout:.1f} s"
        return f"model {model} failed: {answer.message()}"
    return ""


def _tensor(name: str, value: int, ranks: dict[str, int]) -> Any:
    data = np.full((1,) * ranks[name], value, dtype=np.int32)
    tensor = triton.InferInput(name, list(data.shape), "INT32")
    tensor.set_data_from_numpy(data)
    return tensor


def _describe(error: InferenceServerException, url: str, timeout: float) -> str:
    status = error.status() or ""
    if "UNAVAILABLE" in status:
        return f"nothing answers at {url}"
    if "DEADLINE_EXCEEDED" in status:
        return f"{url} {SILENT} {timeout:.1f} s"
    return f"{url}: {error.message()}"
