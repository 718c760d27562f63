"""Requests that a server must refuse, and the message that they are refused with."""

from __future__ import annotations

from typing import Any

import pytest
from raw_calls import RawClient, Refused

from dspark_client.errors import DSparkClientError, InvalidRequestError, error_from_message

IDS = {"input_ids": [1, 2, 3]}
ANSWER = [17, 359, 2, 293]
"""What the tiny model says to IDS."""


def refusal(client: RawClient, inputs: dict[str, Any], error: type[DSparkClientError] = InvalidRequestError) -> str:
    """The message that ``inputs`` are refused with. It must be one that users of our client get as ``error``."""
    with pytest.raises(Refused) as refused:
        list(client.stream(inputs))
    message = refused.value.message
    assert refused.value.code is None  # an error of one request must not end the stream, which others may share
    assert type(error_from_message(message)) is error
    assert "Traceback" not in message
    return message


def invalid(message: str) -> str:
    """As the model itself words it."""
    return f"[INVALID_ARGUMENT] {message}"
