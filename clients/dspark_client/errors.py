"""Errors a caller meets: one base class, one class for each thing a caller can do about it.

Every message of the ``dspark`` model starts with its status in brackets (``[UNAVAILABLE] the queue is full ...``),
because neither the stream's error field nor Triton's error codes can carry all of them. That prefix decides first, then
the gRPC status, then (for what Triton's core rejects before the model sees it, which carries neither) its wording.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import grpc

_PREFIX = re.compile(r"\[(?P<status>[A-Z][A-Z_]+)\]\s*(?P<message>.*)", re.DOTALL)
# How gRPC itself words an UNAVAILABLE that no server sent.
_TRANSPORT_WORDING = re.compile(
    r"connect|socket|handshake|resol(ve|ution)|\bDNS\b|GOAWAY|stream removed|transport|keepalive|\bping", re.IGNORECASE
)

# What Triton's core says without a status, on a stream.
_CORE_WORDING: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"stopp(ing|ed)|not ready|no available versions|maximum queue size", re.IGNORECASE), "UNAVAILABLE"),
    (re.compile(r"unknown model|inference input|expect(s|ed)\b|unexpected", re.IGNORECASE), "INVALID_ARGUMENT"),
)


class DSparkClientError(Exception):
    """Base of every error this package raises on purpose.

    ``status`` names the gRPC code it stands for.
    """

    status = "UNKNOWN"


class InvalidRequestError(DSparkClientError, ValueError):
    """The request can never succeed as it is: change it."""

    status = "INVALID_ARGUMENT"


class ServerUnavailableError(DSparkClientError):
    """The server answered that it takes no more work now (full queue, draining): try again later or elsewhere."""

    status = "UNAVAILABLE"


class ServerConnectionError(DSparkClientError, ConnectionError):
    """The server could not be reached, or the connection was lost."""

    status = "UNAVAILABLE"


class DeadlineError(DSparkClientError, TimeoutError):
    """The answer was not complete in the time given."""

    status = "DEADLINE_EXCEEDED"


class RequestCancelledError(DSparkClientError):
    """The request was cancelled: by the server, or because the client was closed while it ran."""

    status = "CANCELLED"


class ServerError(DSparkClientError):
    """The server failed, or answered something this client does not understand."""

    status = "INTERNAL"


_BY_STATUS: Mapping[str, type[DSparkClientError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "NOT_FOUND": InvalidRequestError,
    "OUT_OF_RANGE": InvalidRequestError,
    "FAILED_PRECONDITION": InvalidRequestError,
    "UNAVAILABLE": ServerUnavailableError,
    "RESOURCE_EXHAUSTED": ServerUnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "CANCELLED": RequestCancelledError,
    "INTERNAL": ServerError,
}


def error_from_message(text: str, status: str | None = None) -> DSparkClientError:
    """The typed error for a server's message.

    Args:
        text: The message, with or without a ``[STATUS]`` prefix. An unknown word in brackets is part of the message.
        status: Name of the gRPC status the message came with, or None if it came without one.
    """
    match = _PREFIX.match(text)
    if match and match["status"] in _BY_STATUS:
        return _BY_STATUS[match["status"]](match["message"])
    if status is None:
        status = next((name for pattern, name in _CORE_WORDING if pattern.search(text)), "INTERNAL")
    error = _BY_STATUS.get(status)
    return error(text) if error else ServerError(f"{text} (gRPC status {status})")


def error_from_rpc(error: grpc.RpcError, url: str) -> DSparkClientError:
    """The typed error for a call that gRPC ended. ``url`` is named where the connection itself is what failed."""
    status: str = error.code().name
    details: str = error.details() or "no details"
    if _PREFIX.match(details):
        return error_from_message(details, status)
    if status == "UNAVAILABLE" and _TRANSPORT_WORDING.search(details):
        return ServerConnectionError(
            f"expected a server at {url}, got: {details}; check the address, the TLS options and that it is running"
        )
    if status == "DEADLINE_EXCEEDED":
        return DeadlineError("the answer was not complete in the time given; raise the timeout or lower max_tokens")
    return error_from_message(details, status)
