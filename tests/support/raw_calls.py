"""Calls of a Triton server below every client library: nothing is checked or refused before the server sees it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

WAIT_SECS = 60.0
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_DATATYPES = {"b": "BOOL", "i4": "INT32", "i8": "INT64", "u8": "UINT64", "f4": "FP32", "f8": "FP64", "O": "BYTES"}


class Refused(Exception):
    """An error that a server sent. ``code`` names the gRPC status; None where the stream's error field brought it."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


@dataclass(frozen=True)
class Tensor:
    """One input exactly as it goes on the wire, for what numpy would not spell."""

    datatype: str
    shape: tuple[int, ...]
    raw: bytes


Value = Any
"""A Tensor, an array, or a Python value: str and bytes become BYTES, int INT32, float FP32, bool BOOL."""


def as_tensor(value: Value) -> Tensor:
    """Lists and single values become tensors of one axis; arrays keep their shape."""
    if isinstance(value, Tensor):
        return value
    array = value if isinstance(value, np.ndarray) else _array(value if isinstance(value, list | tuple) else [value])
    kind = array.dtype.kind
    datatype = _DATATYPES[kind if kind in "bO" else f"{kind}{array.dtype.itemsize}"]
    raw = array.tobytes()
    if datatype == "BYTES":
        raw = serialize_byte_tensor(array).item() if array.size else b""
    return Tensor(datatype, array.shape, raw)


def _array(values: list[Any] | tuple[Any, ...]) -> NDArray[Any]:
    first = values[0] if values else 0
    if isinstance(first, str | bytes):
        return np.array([item.encode() if isinstance(item, str) else item for item in values], dtype=np.object_)
    kinds: dict[type, Any] = {bool: np.bool_, int: np.int32, float: np.float32}
    return np.array(values, dtype=kinds[type(first)])


def infer_request(
    inputs: Mapping[str, Value], model: str = "dspark", outputs: tuple[str, ...] = ()
) -> service_pb2.ModelInferRequest:
    """The message for these inputs."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        tensor = as_tensor(value)
        request.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
        request.raw_input_contents.append(tensor.raw)
    for name in outputs:
        request.outputs.add(name=name)
    return request


class RawClient:
    """A channel of its own to one server's gRPC service."""

    def __init__(self, grpc_url: str) -> None:
        # Without the private pool, channels to one address share a connection and closing one closes nothing.
        self.channel = grpc.insecure_channel(grpc_url, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def open_stream(self, inputs: Mapping[str, Value], model: str = "dspark", timeout: float | None = WAIT_SECS) -> Any:
        """The call of one streamed request: an iterator of ModelStreamInferResponse with ``cancel()``.

        Errors come as messages. The header ``triton_grpc_error`` would turn them into gRPC statuses, but a Triton 2.51
        that served such an error dies of a later stream (SIGSEGV). One whose stream is cancelled in the instant of its
        end does not stop within its exit timeout: read streams to their end where a clean stop matters.
        """
        return self.stub.ModelStreamInfer(iter([infer_request(inputs, model)]), timeout=timeout)

    def stream(self, inputs: Mapping[str, Value], model: str = "dspark") -> Iterator[dict[str, list[Any]]]:
        """The tensors of each response. Raises Refused."""
        message = ""
        try:
            for response in self.open_stream(inputs, model):
                message = message or response.error_message
                if not message:
                    yield tensors_of(response.infer_response)
        except grpc.RpcError as error:
            raise Refused(error.details() or "", error.code().name) from None
        if message:
            raise Refused(message, None)

    def generate(self, inputs: Mapping[str, Value], model: str = "dspark") -> dict[str, list[Any]]:
        """The only response of a request that does not stream. Raises Refused."""
        (only,) = self.stream(inputs, model)
        return only

    def infer(self, inputs: Mapping[str, Value], model: str, outputs: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
        """The tensors of a unary call. Raises Refused."""
        try:
            response = self.stub.ModelInfer(infer_request(inputs, model, outputs), timeout=WAIT_SECS)
        except grpc.RpcError as error:
            raise Refused(error.details() or "", error.code().name) from None
        result = InferResult(response)
        return {output.name: result.as_numpy(output.name) for output in response.outputs}


def tensors_of(response: service_pb2.ModelInferResponse) -> dict[str, list[Any]]:
    """Each output as a list; bytes as text."""
    result = InferResult(response)
    values = {output.name: result.as_numpy(output.name).tolist() for output in response.outputs}
    return {
        name: [item.decode() if isinstance(item, bytes) else item for item in items] for name, items in values.items()
    }


@dataclass(frozen=True)
class HttpAnswer:
    """What an HTTP call came back with."""

    status: int
    content_type: str
    body: str

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON of each server-sent event."""
        return [json.loads(line[5:]) for line in self.body.splitlines() if line.startswith("data:")]


def post(url: str, body: object, timeout: float = WAIT_SECS) -> HttpAnswer:
    """POST a JSON value, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return HttpAnswer(answer.status, answer.headers.get("Content-Type", ""), answer.read().decode())
    except urllib.error.HTTPError as error:
        return HttpAnswer(error.code, error.headers.get("Content-Type", ""), error.read().decode())
