"""Reads Prometheus' text format: the samples of one endpoint."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from dspark_client.errors import InvalidRequestError, ServerConnectionError

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)\s*(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?\s*$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_LONGEST_S = 1e6
"""A socket takes no number of any size."""


@dataclass(frozen=True)
class Sample:
    """One line: a metric's value under its labels."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def parse(text: str, prefix: str = "") -> Iterator[Sample]:
    """The samples whose names start with ``prefix``, in order. Lines that are not samples are passed over."""
    for line in text.splitlines():
        match = _SAMPLE.match(line) if line.startswith(prefix) else None
        if match:
            labels = tuple((name, _unescape(value)) for name, value in _LABEL.findall(match["labels"] or ""))
            yield Sample(match["name"], labels, float(match["value"]))


def fetch(url: str, prefix: str, timeout_s: float) -> list[Sample]:
    """Reads ``url``; ``host:port`` alone means ``http://host:port/metrics``.

    Raises:
        InvalidRequestError: the address is not one of HTTP.
        ServerConnectionError: it cannot be read.
    """
    full = _full(url)
    try:
        with urllib.request.urlopen(full, timeout=min(timeout_s, _LONGEST_S)) as response:
            return list(parse(response.read().decode(), prefix))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ServerConnectionError(f"expected Prometheus metrics at {full}, got: {reason}") from error


def _full(url: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme in {"http", "https"} and parts.netloc:
            return urlunsplit(parts._replace(path=parts.path if parts.path.strip("/") else "/metrics"))
    raise InvalidRequestError(f"metrics url: expected http://host:port/metrics, got {url!r}")


def _unescape(value: str) -> str:
    return _ESCAPE.sub(lambda match: "\n" if match[1] == "n" else match[1], value)
