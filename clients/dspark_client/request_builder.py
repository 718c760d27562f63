"""From a prompt and options to the protobuf message, driven by the rows of ``schema.INPUTS``."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from dspark_client.errors import InvalidRequestError
from dspark_client.options import GenerateOptions, Message
from dspark_client.schema import INPUTS, Datatype, TensorSpec

ChatMessage = Message | Mapping[str, object]
TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Prompt:
    """A prompt in exactly one of three forms.

    Raises:
        InvalidRequestError: none is given, or more than one.
    """

    text_input: str | None = None
    input_ids: TokenIds | None = None
    messages: Sequence[ChatMessage] | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise InvalidRequestError(f"expected exactly one of text_input, input_ids and messages, got {got}")


def build_request(
    prompt: Prompt,
    options: GenerateOptions,
    *,
    stream: bool,
    model_name: str,
    model_version: str = "",
    request_id: str = "",
) -> service_pb2.ModelInferRequest:
    """The message for Triton's ``ModelStreamInfer``: one tensor for every value that is set, in the schema's order.

    Raises:
        InvalidRequestError: a value cannot be written as its tensor; the message names the tensor and the value.
    """
    for name, text in (("model_name", model_name), ("model_version", model_version), ("request_id", request_id)):
        _utf8(name, text)
    request = service_pb2.ModelInferRequest(model_name=model_name, model_version=model_version, id=request_id)
    values = _values(prompt, options, stream)
    for spec in INPUTS:
        value = values.get(spec.name)
        if value is not None:
            array = encode(spec, value)
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
            request.raw_input_contents.append(_raw(array))
    return request


def encode(spec: TensorSpec, value: object) -> npt.NDArray[np.generic]:
    """A value as the array of its tensor: shape [1] for a scalar, [n] with n >= 1 for a list.

    Raises:
        InvalidRequestError: wrong type, an integer or number its datatype cannot hold, text that is not Unicode, or an
            empty list.
    """
    encode_one = _ENCODERS[spec.datatype]
    if spec.scalar:
        items: list[object] = [value]
    elif isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | np.ndarray):
        raise InvalidRequestError(f"{spec.name}: expected a list, got {value!r}")
    elif isinstance(value, np.ndarray) and value.ndim != 1:
        raise InvalidRequestError(f"{spec.name}: expected an array of one dimension, got shape {list(value.shape)}")
    else:
        items = list(value)
        if not items:
            raise InvalidRequestError(f"{spec.name}: expected at least one entry, got an empty list")
    return np.array([encode_one(spec, item) for item in items], dtype=_DTYPES[spec.datatype])


def _values(prompt: Prompt, options: GenerateOptions, stream: bool) -> dict[str, object]:
    values: dict[str, object] = {field.name: getattr(options, field.name) for field in fields(options)}
    for name in ("stop_words", "bad_words"):
        words = values[name]
        values[name] = None if isinstance(words, Sequence) and not words and not isinstance(words, str) else words
    values["text_input"] = prompt.text_input
    values["input_ids"] = prompt.input_ids
    values["messages"] = None if prompt.messages is None else _messages_json(prompt.messages)
    values["stream"] = stream
    return values


def _messages_json(messages: Sequence[ChatMessage]) -> str:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(f"messages: expected a list of messages, got {messages!r}")
    try:
        return json.dumps(
            [asdict(m) if is_dataclass(m) and not isinstance(m, type) else dict(m) for m in messages],  # type: ignore[arg-type]
            ensure_ascii=False,
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"messages: expected Message objects or mappings that JSON can hold, got one it cannot: {error}"
        ) from error


def _integer(spec: TensorSpec, value: object) -> int:
    limits = np.iinfo(spec.datatype.lower())
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # TypeError where it is none
    except TypeError:
        raise InvalidRequestError(f"{spec.name}: expected an integer, got {value!r}") from None
    if not limits.min <= number <= limits.max:
        raise InvalidRequestError(
            f"{spec.name}: expected an integer from {limits.min} to {limits.max} ({spec.datatype}), got {number}"
        )
    return number


def _number(spec: TensorSpec, value: object) -> float:
    if isinstance(value, bool | np.bool_ | str) or not hasattr(value, "__float__"):
        raise InvalidRequestError(f"{spec.name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        number = float("inf")
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise InvalidRequestError(f"{spec.name}: expected a finite number ({spec.datatype}), got {value!r}")
    return number


def _flag(spec: TensorSpec, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InvalidRequestError(f"{spec.name}: expected True or False, got {value!r}")
    return bool(value)


def _text(spec: TensorSpec, value: object) -> bytes:
    return _utf8(spec.name, value)


def _utf8(name: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name}: expected text, got {value!r}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name}: expected Unicode text, got a lone surrogate: {error}") from error


def _raw(array: npt.NDArray[np.generic]) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    packed: bytes = serialize_byte_tensor(array).item()
    return packed


_DTYPES: Mapping[Datatype, type[np.generic]] = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
}
_ENCODERS: Mapping[Datatype, Callable[[TensorSpec, object], object]] = {
    "BYTES": _text,
    "BOOL": _flag,
    "INT32": _integer,
    "INT64": _integer,
    "UINT64": _integer,
    "FP32": _number,
}
