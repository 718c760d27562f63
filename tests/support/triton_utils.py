"""What Triton's stub gives a Python model, as far as the adapter uses it: for faults no server makes on demand."""

from __future__ import annotations

import threading
from types import ModuleType

import numpy as np


class TritonError(Exception):
    """A message and a code."""

    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Tensor:
    """A named array. The next one named ``full`` cannot be made."""

    full: str | None = None

    def __init__(self, name: str, array: np.ndarray) -> None:
        if name == Tensor.full:
            Tensor.full = None
            raise RuntimeError("no shared memory is left")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors, self.error = tensors or [], error


class MetricFamily:
    """Takes everything, shows nothing."""

    COUNTER, GAUGE, HISTOGRAM = range(3)

    def __init__(self, **_: object) -> None: ...

    def Metric(self, **_: object) -> MetricFamily:
        return self

    def increment(self, _: float) -> None: ...

    set = observe = increment


class Request:
    """A request and its response sender in one: ``responses`` is what came, ``ended`` is set with the last."""

    def __init__(self, **inputs: object) -> None:
        self._inputs = [Tensor(name, np.asarray(value)) for name, value in inputs.items()]
        self.responses: list[InferenceResponse] = []
        self.ended = threading.Event()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self.ended.is_set(), "a response after the last one"
        self.responses.append(response)
        if flags:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return False


def module() -> ModuleType:
    """To be imported as ``triton_python_backend_utils``."""
    made = ModuleType("triton_python_backend_utils")
    made.__dict__.update(
        TritonError=TritonError,
        TritonModelException=type("TritonModelException", (Exception,), {}),
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        MetricFamily=MetricFamily,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    return made
