"""Is a server able to infer? Readiness alone does not notice a dead stub, so a tiny real request is made."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

DEFAULT_MODEL = "dspark"
PROBE_TOKEN = 1
RETRY_SECS = 0.5
# The adapter starts every error with its status in brackets; only a living model writes this one.
REFUSED = "[UNAVAILABLE]"


@dataclass(frozen=True)
class Health:
    """A check's outcome."""

    healthy: bool
    """The model answered the request."""
    alive: bool
    """Healthy, or the model itself refused for lack of room: restarting it would not help."""
    reason: str
    """What was seen, for a person."""
    seconds: float


def check(url: str, model: str | None = DEFAULT_MODEL, timeout: float = 10.0) -> Health:
    """Check that the server is ready and that ``model`` answers a request for one token.

    Args:
        url: ``host:port`` of the gRPC service.
        model: a model that speaks the wire contract of ``dspark``; None checks readiness only.
        timeout: seconds for everything.
    """
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
    return Health(False, REFUSED in reason, reason, seconds)


def wait(url: str, model: str | None = DEFAULT_MODEL, timeout: float = 10.0, patience: float = 0.0) -> Health:
    """Check until the outcome is healthy or ``patience`` seconds have passed; returns the last outcome."""
    deadline = time.monotonic() + patience
    while not (state := check(url, model, timeout)).healthy and time.monotonic() < deadline:
        time.sleep(RETRY_SECS)
    return state


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
        return f"model {model} gave no answer within {timeout:.1f} s"
    finally:
        # A stream that is cancelled while its last answer is on its way can stay open in Triton, which then waits for
        # it when it should stop.
        client.stop_stream(cancel_requests=not answered)
    if isinstance(answer, InferenceServerException):
        if "Deadline Exceeded" in str(answer):
            return f"model {model} gave no answer within {timeout:.1f} s"
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
        return f"{url} gave no answer within {timeout:.1f} s"
    return f"{url}: {error.message()}"
