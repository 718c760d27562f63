"""Errors that reach a user: one base class, one clear message each, a status for the wire.

A message says what was expected, what came and what to do about it. The adapter maps ``status`` to Triton's error
codes; nothing else in the engine knows about transport.
"""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """Outcome of a failed request, named as the gRPC codes they become."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class DSparkError(Exception):
    """Base of every error this project raises on purpose."""

    status = Status.INTERNAL


class InvalidRequest(DSparkError):
    """The request can never succeed as it was sent."""

    status = Status.INVALID_ARGUMENT


class QueueFull(DSparkError):
    """The admission queue is at its limit, or the engine drains: try again later or elsewhere."""

    status = Status.UNAVAILABLE


class DeadlineExceeded(DSparkError):
    """The request's deadline passed before it finished."""

    status = Status.DEADLINE_EXCEEDED


class RequestCancelled(DSparkError):
    """The client went away or asked to stop."""

    status = Status.CANCELLED


class InternalError(DSparkError):
    """Something broke on our side; the request is lost, the engine goes on."""


class NotFinite(InternalError):
    """The model gave NaN or infinite numbers."""


class ArtifactError(DSparkError):
    """An exported artifact is missing, corrupt, or does not fit this engine. Raised at load."""


class ConfigError(DSparkError):
    """A setting has a wrong value; the message names its key. Raised at load."""
