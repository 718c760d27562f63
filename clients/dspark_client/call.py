"""One request made ready to send: what the blocking and the asyncio client share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from tritonclient.grpc import service_pb2

from dspark_client.completion import Piece, pieces_of
from dspark_client.connection import ConnectionOptions
from dspark_client.errors import ServerConnectionError, error_from_message
from dspark_client.options import GenerateOptions
from dspark_client.request_builder import Prompt, build_request
from dspark_client.retry import Deadline, RetryPolicy

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "dspark"
PROBE_TIMEOUT_S = 5.0
"""How long a health check waits where its caller does not say."""
POLL_INTERVAL_S = 0.5
_SERVER_DEADLINE_GRACE_S = 2.0
_TIMEOUT_MS_MAX = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Call:
    """A built request with its headers and its time."""

    request: service_pb2.ModelInferRequest
    metadata: tuple[tuple[str, str], ...]
    deadline: Deadline


@dataclass(frozen=True)
class ClientSettings:
    """What a client was made with."""

    url: str
    model_name: str
    model_version: str
    connection: ConnectionOptions
    retry: RetryPolicy
    timeout: float | None = None
    """Seconds for a whole request, retries and all, where the call does not say; None is no limit."""

    def prepare(
        self,
        prompt: Prompt,
        options: GenerateOptions,
        *,
        stream: bool,
        timeout: float | None,
        headers: Mapping[str, str] | None,
        request_id: str,
    ) -> Call:
        """Builds the request. The caller's time becomes the server's deadline too, unless the options have their own.

        Raises:
            InvalidRequestError: a value cannot be sent.
        """
        seconds = self.timeout if timeout is None else timeout
        deadline = Deadline(seconds)
        if seconds is None and options.timeout_ms is not None and isinstance(options.timeout_ms, int):
            # The server's own message should win; this only bounds a server that does not answer at all.
            server_ms = min(max(options.timeout_ms, 0), _TIMEOUT_MS_MAX)
            deadline = Deadline(server_ms / 1000 + _SERVER_DEADLINE_GRACE_S)
        elif seconds is not None and options.timeout_ms is None:
            options = replace(options, timeout_ms=max(1, math.ceil(min(seconds * 1000, _TIMEOUT_MS_MAX))))
        request = build_request(
            prompt,
            options,
            stream=stream,
            model_name=self.model_name,
            model_version=self.model_version,
            request_id=request_id,
        )
        return Call(request, self.connection.metadata(headers), deadline)


@dataclass
class ResponseReader:
    """Turns the messages of one gRPC stream into pieces, and notices where the stream ends too early."""

    finished: bool = field(default=False, init=False)

    def read(self, message: service_pb2.ModelStreamInferResponse) -> tuple[Piece, ...]:
        """The pieces of one message.

        Raises:
            DSparkClientError: the message is an error, or cannot be read.
        """
        if message.error_message:
            raise error_from_message(message.error_message)
        response = message.infer_response
        self.finished = response.parameters["triton_final_response"].bool_param
        return pieces_of(response)

    def check_finished(self) -> None:
        """To call at the end of the stream.

        Raises:
            ServerConnectionError: no message was marked as the last.
        """
        if not self.finished:
            raise ServerConnectionError(
                "expected a last response, got the end of the stream; the server may have been stopped"
            )
