"""How to reach the server: address, TLS, keepalive, compression, headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grpc

from dspark_client.errors import InvalidRequestError

Compression = Literal["gzip", "deflate"]
ChannelArguments = list[tuple[str, int | str]]

_COMPRESSION: Mapping[str | None, grpc.Compression] = {
    None: grpc.Compression.NoCompression,
    "gzip": grpc.Compression.Gzip,
    "deflate": grpc.Compression.Deflate,
}
# Asks Triton to end a stream with the error's gRPC status. Version 2.51 crashes over it (SIGSEGV after a few errors).
_CRASHING_HEADER = "triton_grpc_error"
_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
_LONGEST_PING_S = 2_000_000.0


@dataclass(frozen=True)
class TlsOptions:
    """Certificates as PEM files. Without ``root_certificates`` gRPC's own roots are trusted."""

    root_certificates: Path | None = None
    certificate_chain: Path | None = None
    """The client's certificate, for mutual TLS; with ``private_key``."""
    private_key: Path | None = None
    server_name: str | None = None
    """The name to expect in the server's certificate, where it is not the one in the address."""

    def __post_init__(self) -> None:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise InvalidRequestError("TLS: expected certificate_chain and private_key together, got one of them")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            InvalidRequestError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.root_certificates),
            private_key=_read(self.private_key),
            certificate_chain=_read(self.certificate_chain),
        )


@dataclass(frozen=True)
class KeepaliveOptions:
    """Pings that find dead connections and keep proxies from closing idle ones.

    A server closes connections that ping more often than it allows (Triton's default: every 300 s without data; raise
    it there with ``--grpc-http2-min-recv-ping-interval-without-data`` first).

    Raises:
        InvalidRequestError: a time is not above 0, or longer than gRPC can count.
    """

    interval_s: float
    timeout_s: float = 20.0
    without_calls: bool = False

    def __post_init__(self) -> None:
        for name in ("interval_s", "timeout_s"):
            seconds = getattr(self, name)
            if not 0.001 <= seconds <= _LONGEST_PING_S:
                raise InvalidRequestError(
                    f"keepalive: expected {name} from 0.001 to {_LONGEST_PING_S:.0f}, got {seconds}"
                )


@dataclass(frozen=True)
class ConnectionOptions:
    """Options of a connection. Without ``tls`` it is not encrypted."""

    tls: TlsOptions | None = None
    keepalive: KeepaliveOptions | None = None
    compression: Compression | None = None
    """Of what the client sends; the server's side is a server option."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with every call; names are lowered, as gRPC wants them."""

    def __post_init__(self) -> None:
        if self.compression not in _COMPRESSION:
            raise InvalidRequestError(f"compression: expected gzip, deflate or None, got {self.compression!r}")

    @property
    def grpc_compression(self) -> grpc.Compression:
        return _COMPRESSION[self.compression]

    def metadata(self, headers: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
        """The headers of a call: the connection's, then its own over them.

        Raises:
            InvalidRequestError: a header that gRPC cannot send as text, or that crashes the server.
        """
        merged = {}
        for given in (self.headers, headers or {}):
            for name, value in given.items():
                _check_header(name, value)
                merged[name.lower()] = value
        if _CRASHING_HEADER in merged:
            raise InvalidRequestError(f"headers: expected none named {_CRASHING_HEADER}: it crashes Triton 2.51")
        return tuple(merged.items())

    def channel_arguments(self) -> ChannelArguments:
        """Arguments for gRPC: no limit on message sizes, and reconnection as quick as our own retries."""
        arguments: ChannelArguments = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # A name with several addresses (a headless service of Kubernetes) is several servers: calls take turns.
            ("grpc.lb_policy_name", "round_robin"),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            arguments.append(("grpc.ssl_target_name_override", self.tls.server_name))
        if self.keepalive is not None:
            arguments += [
                ("grpc.keepalive_time_ms", round(self.keepalive.interval_s * 1000)),
                ("grpc.keepalive_timeout_ms", round(self.keepalive.timeout_s * 1000)),
                ("grpc.keepalive_permit_without_calls", int(self.keepalive.without_calls)),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        return arguments

    def open(self, url: str) -> grpc.Channel:
        """A channel for blocking calls. It connects with the first call."""
        check_url(url)
        if self.tls is None:
            return grpc.insecure_channel(url, options=self.channel_arguments())
        return grpc.secure_channel(url, self.tls.credentials(), options=self.channel_arguments())

    def open_async(self, url: str) -> grpc.aio.Channel:
        """A channel for the running event loop. It connects with the first call."""
        check_url(url)
        if self.tls is None:
            return grpc.aio.insecure_channel(url, options=self.channel_arguments())
        return grpc.aio.secure_channel(url, self.tls.credentials(), options=self.channel_arguments())


def check_url(url: str) -> None:
    """Refuses an address of HTTP: gRPC would take its scheme for a host name.

    Raises:
        InvalidRequestError: ``url`` is empty or starts with a scheme gRPC does not know.
    """
    scheme = url.partition("://")[0] if "://" in url else ""
    if not url or scheme in {"http", "https", "grpc", "grpcs"}:
        raise InvalidRequestError(f"url: expected host:port of Triton's gRPC service (localhost:8001), got {url!r}")


def _check_header(name: object, value: object) -> None:
    if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name.lower()) or name.lower().endswith("-bin"):
        raise InvalidRequestError(
            f"headers: expected names of letters, digits, '-', '_' and '.' that do not end in '-bin', got {name!r}"
        )
    if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
        # Not the value: it may be a password.
        raise InvalidRequestError(f"headers: expected printable ASCII text as the value of {name!r}")


def parse_headers(lines: Sequence[str]) -> dict[str, str]:
    """Headers written as ``name=value``.

    Raises:
        InvalidRequestError: a line has no ``=`` or no name.
    """
    headers = {}
    for line in lines:
        name, separator, value = line.partition("=")
        if not separator or not name:
            raise InvalidRequestError(f"header: expected name=value, got {line!r}")
        headers[name] = value
    return headers


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"TLS: expected a readable PEM file, got {error}") from error
