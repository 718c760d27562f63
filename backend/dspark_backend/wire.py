"""Tensors of the wire <-> requests and results. Plain numpy: no server is imported, and none is needed to test it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.delta import Delta
from dspark_backend.errors import InvalidRequest
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_client.schema import INPUTS, OUTPUTS, TensorSpec

NUMPY_DTYPES: Mapping[str, Any] = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
}

_INPUT_SPECS = {spec.name: spec for spec in INPUTS}
_OUTPUT_SPECS = {spec.name: spec for spec in OUTPUTS}

# Tensors whose name differs from the field they fill.
_RENAMED = {
    "text_input": "text",
    "return_log_probs": "log_probs",
    "num_return_sequences": "num_sequences",
    "exclude_input_in_output": "echo",
}
_SAMPLING = frozenset(SamplingParams.__dataclass_fields__)

Arrays = Mapping[str, NDArray[Any]]


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidRequest(f"{name}: expected UTF-8 text, got {type(value).__name__}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: expected UTF-8 text, got invalid bytes at offset {error.start}") from None


def _value(spec: TensorSpec, array: NDArray[Any]) -> Any:
    """The Python value of one input: a scalar, or a tuple."""
    expected = np.dtype(NUMPY_DTYPES[spec.datatype])
    if array.dtype != expected and not (spec.datatype == "BYTES" and array.dtype.kind in "SU"):
        raise InvalidRequest(f"{spec.name}: expected {spec.datatype}, got an array of {array.dtype}")
    if spec.scalar and array.size != 1:
        raise InvalidRequest(f"{spec.name}: expected one value (shape [1]), got shape {list(array.shape)}")
    if not spec.scalar and array.ndim != 1:
        raise InvalidRequest(f"{spec.name}: expected a list (shape [n]), got shape {list(array.shape)}")
    if spec.datatype == "BYTES":
        values = [_text(spec.name, value) for value in array.reshape(-1)]
    else:
        values = array.reshape(-1).tolist()
    return values[0] if spec.scalar else tuple(values)


def parse_request(arrays: Arrays) -> GenerationRequest:
    """The request that a set of input tensors spells. Absent ones take the defaults of GenerationRequest.

    Raises:
        InvalidRequest: an unknown tensor, a wrong dtype or shape, invalid UTF-8, or a value out of range.
    """
    fields: dict[str, Any] = {"stream": False}
    sampling: dict[str, Any] = {}
    for name, array in arrays.items():
        spec = _INPUT_SPECS.get(name)
        if spec is None:
            raise InvalidRequest(f"{name}: unknown input; expected one of {', '.join(_INPUT_SPECS)}")
        value = _value(spec, array)
        if name == "exclude_input_in_output":
            value = not value
        key = _RENAMED.get(name, name)
        (sampling if key in _SAMPLING else fields)[key] = value
    return GenerationRequest(sampling=SamplingParams(**sampling), **fields)


def render(deltas: Sequence[Delta]) -> dict[str, NDArray[Any]]:
    """Output tensors of one response: one delta while streaming, one a sequence where the client wants it all at once.

    Only tensors that apply are there: the summary comes where every delta is the last of its sequence.
    """
    values: dict[str, Any] = {
        "text_output": [delta.text.encode("utf-8", errors="replace") for delta in deltas],
        "output_ids": [token for delta in deltas for token in delta.token_ids],
        "sequence_index": [delta.sequence_index for delta in deltas],
    }
    log_probs = [value for delta in deltas for value in delta.log_probs]
    if log_probs:
        values["output_log_probs"] = log_probs
    usages = [delta.usage for delta in deltas if delta.usage is not None]
    if usages and len(usages) == len(deltas):
        values |= {
            "finish_reason": [delta.finish_reason.value.encode() for delta in deltas if delta.finish_reason],
            "num_input_tokens": [usages[0].input_tokens],
            "num_output_tokens": [usage.output_tokens for usage in usages],
            "acceptance_rate": [usage.acceptance_rate for usage in usages],
            "total_accepted_draft_tokens": [usage.accepted_draft_tokens for usage in usages],
            "total_draft_tokens": [usage.draft_tokens for usage in usages],
            "total_verified_draft_tokens": [usage.verified_draft_tokens for usage in usages],
            "num_rounds": [usage.rounds for usage in usages],
            "arrival_time_ns": [usages[0].arrival_ns],
            "first_scheduled_time_ns": [usage.first_scheduled_ns for usage in usages],
            "first_token_time_ns": [usage.first_token_ns for usage in usages],
            "last_token_time_ns": [usage.last_token_ns for usage in usages],
        }
    return {
        name: np.array(value, dtype=NUMPY_DTYPES[_OUTPUT_SPECS[name].datatype]) for name, value in values.items()
    }  # fmt: skip


@dataclass
class Collector:
    """Holds back the deltas of a request that wants one response, and gives them in order of sequence."""

    stream: bool
    _held: list[Delta] = field(default_factory=list)

    def take(self, delta: Delta, last: bool) -> list[Delta]:
        """The deltas to send now, maybe none."""
        if self.stream:
            return [delta]
        self._held.append(delta)
        return sorted(self._held, key=lambda held: held.sequence_index) if last else []
