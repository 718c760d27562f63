"""The blocking client.

It speaks through the generated stub of ``tritonclient.grpc`` rather than its ``InferenceServerClient``, which runs one
stream at a time, leaves a thread behind for every cancelled stream, and does not tell when a stream just ends.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Self, TypeVar

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dspark_client.call import (
    DEFAULT_MODEL,
    DEFAULT_URL,
    POLL_INTERVAL_S,
    PROBE_TIMEOUT_S,
    Call,
    ClientSettings,
    ResponseReader,
)
from dspark_client.completion import Completion, Piece, collect
from dspark_client.connection import ConnectionOptions
from dspark_client.errors import DeadlineError, DSparkClientError, RequestCancelledError, error_from_rpc
from dspark_client.options import GenerateOptions
from dspark_client.request_builder import ChatMessage, Prompt, TokenIds
from dspark_client.retry import Deadline, RetryPolicy
from dspark_client.server_info import ModelInfo, ModelStatistics, models_of, statistics_of

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class DSparkClient:
    """Client of the ``dspark`` model for blocking code. Threads may share one.

    Args:
        url: host:port of Triton's gRPC service.
        model_name: The model to call.
        model_version: Its version; empty lets the server choose.
        connection: TLS, keepalive, compression, headers.
        retry: When a request is sent again; never after its first piece.
        timeout: Seconds for a whole request where the call does not say; None is no limit.

    Raises:
        InvalidRequestError: an option cannot work; nothing is sent before the first call.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model_name: str = DEFAULT_MODEL,
        model_version: str = "",
        connection: ConnectionOptions | None = None,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
    ) -> None:
        self.settings = ClientSettings(
            url, model_name, model_version, connection or ConnectionOptions(), retry or RetryPolicy(), timeout
        )
        self._rng = random.Random()
        self._channel = self.settings.connection.open(url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; requests that still run are cancelled. May be called more than once."""
        self._closed = True
        self._channel.close()

    def stream(
        self,
        text_input: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        messages: Sequence[ChatMessage] | None = None,
        options: GenerateOptions | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> Generator[Piece]:
        """Generates, handing out pieces as they come. The prompt is exactly one of text, token ids and messages.

        The request is sent with the first ``next``; closing the generator, leaving its loop or an exception in it
        (KeyboardInterrupt too) cancels the request on the server.

        Raises:
            InvalidRequestError: at once, if the request cannot be written.
            DSparkClientError: while iterating; its subclass says what to do.
        """
        prompt = Prompt(text_input, input_ids, messages)
        call = self.settings.prepare(
            prompt,
            options or GenerateOptions(),
            stream=True,
            timeout=timeout,
            headers=headers,
            request_id=request_id,
        )
        return self._pieces(call)

    def generate(
        self,
        text_input: str | None = None,
        *,
        input_ids: TokenIds | None = None,
        messages: Sequence[ChatMessage] | None = None,
        options: GenerateOptions | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> list[Completion]:
        """Generates and waits: one completion for each of ``num_return_sequences``, in order.

        Raises:
            DSparkClientError: its subclass says what to do.
        """
        prompt = Prompt(text_input, input_ids, messages)
        call = self.settings.prepare(
            prompt,
            options or GenerateOptions(),
            stream=False,
            timeout=timeout,
            headers=headers,
            request_id=request_id,
        )
        return collect(self._pieces(call))

    def is_ready(self, *, timeout: float = PROBE_TIMEOUT_S) -> bool:
        """True if the server and the model are ready. An unreachable server is not ready, not an error."""
        self._check_open()
        try:
            return self._probe(timeout)
        except DSparkClientError as error:
            _log.debug("not ready: %s", error)
            return False

    def wait_until_ready(self, timeout: float) -> None:
        """Waits for server and model.

        Raises:
            DeadlineError: they were not ready within ``timeout`` seconds.
        """
        deadline = Deadline(timeout)
        while not self.is_ready(timeout=max(0.05, min(PROBE_TIMEOUT_S, deadline.remaining() or 0.0))):
            remaining = deadline.remaining() or 0.0
            if remaining == 0.0:
                raise DeadlineError(
                    f"expected model {self.settings.model_name!r} at {self.settings.url} to be ready within {timeout} s"
                )
            time.sleep(min(POLL_INTERVAL_S, remaining))

    def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """The server's model repository, loaded or not."""
        request = service_pb2.RepositoryIndexRequest()
        return models_of(self._unary(self._stub.RepositoryIndex, request, timeout))

    def statistics(self, *, timeout: float | None = None) -> list[ModelStatistics]:
        """Triton's counts of the model, an entry a version."""
        request = service_pb2.ModelStatisticsRequest(name=self.settings.model_name, version=self.settings.model_version)
        return statistics_of(self._unary(self._stub.ModelStatistics, request, timeout))

    def _pieces(self, call: Call) -> Generator[Piece]:
        attempt, started = 1, False
        while True:
            try:
                with closing(self._attempt(call)) as pieces:
                    for piece in pieces:
                        started = True
                        yield piece
                return
            except DSparkClientError as error:
                wait = self.settings.retry.wait_after(
                    error, attempt, started=started, deadline=call.deadline, rng=self._rng
                )
                if wait is None:
                    raise
                _log.info("attempt %d failed, next in %.2f s: %s", attempt, wait, error)
            time.sleep(wait)
            attempt += 1

    def _attempt(self, call: Call) -> Generator[Piece]:
        self._check_open()
        reader = ResponseReader()
        # One request and the end of ours: the server closes the stream after its last response.
        stream = self._begin(
            self._stub.ModelStreamInfer,
            iter((call.request,)),
            timeout=call.deadline.remaining(),
            metadata=call.metadata,
            compression=self.settings.connection.grpc_compression,
        )
        try:
            for message in stream:
                yield from reader.read(message)
            reader.check_finished()
        except grpc.RpcError as error:
            # What breaks behind the last response takes nothing of the answer away.
            if not reader.finished:
                raise error_from_rpc(error, self.settings.url) from error
        finally:
            stream.cancel()

    def _probe(self, timeout: float) -> bool:
        arguments = {"timeout": Deadline(timeout).remaining(), "metadata": self.settings.connection.metadata()}
        try:
            model = service_pb2.ModelReadyRequest(name=self.settings.model_name, version=self.settings.model_version)
            return bool(
                self._begin(self._stub.ServerReady, service_pb2.ServerReadyRequest(), **arguments).ready
                and self._begin(self._stub.ModelReady, model, **arguments).ready
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.settings.url) from error

    def _unary(self, method: Callable[..., _T], request: object, timeout: float | None) -> _T:
        deadline = Deadline(self.settings.timeout if timeout is None else timeout)
        attempt = 1
        while True:
            self._check_open()
            try:
                metadata = self.settings.connection.metadata()
                return self._begin(method, request, timeout=deadline.remaining(), metadata=metadata)
            except grpc.RpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.settings.url)
                wait = self.settings.retry.wait_after(error, attempt, started=False, deadline=deadline, rng=self._rng)
                if wait is None:
                    raise error from rpc_error
            time.sleep(wait)
            attempt += 1

    def _begin(self, method: Callable[..., _T], request: object, **arguments: object) -> _T:
        """Calls ``method``. Raises RequestCancelledError where another thread closed the client just now."""
        try:
            return method(request, **arguments)
        except ValueError:  # so gRPC says that a channel is closed
            self._check_open()
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelledError("expected an open client, got one that was closed; make a new one")
