"""Thin clients of the dspark model: ``DSparkClient`` for blocking code, ``AsyncDSparkClient`` for asyncio."""

from dspark_client.aio import AsyncDSparkClient
from dspark_client.client import DSparkClient
from dspark_client.completion import Completion, Piece, Usage
from dspark_client.connection import ConnectionOptions, KeepaliveOptions, TlsOptions
from dspark_client.errors import (
    DeadlineError,
    DSparkClientError,
    InvalidRequestError,
    RequestCancelledError,
    ServerConnectionError,
    ServerError,
    ServerUnavailableError,
)
from dspark_client.options import GenerateOptions, Message
from dspark_client.retry import RetryPolicy
from dspark_client.server_info import ModelInfo, ModelStatistics, Timing

__all__ = [
    "AsyncDSparkClient",
    "Completion",
    "ConnectionOptions",
    "DSparkClient",
    "DSparkClientError",
    "DeadlineError",
    "GenerateOptions",
    "InvalidRequestError",
    "KeepaliveOptions",
    "Message",
    "ModelInfo",
    "ModelStatistics",
    "Piece",
    "RequestCancelledError",
    "RetryPolicy",
    "ServerConnectionError",
    "ServerError",
    "ServerUnavailableError",
    "Timing",
    "TlsOptions",
    "Usage",
]
