"""What a server publishes as Prometheus text, as far as the launcher and the health check look at it."""

from __future__ import annotations

import http.client
import re
import urllib.request
from typing import NamedTuple

_LINE = re.compile(r"^(\w+)(?:\{([^}]*)\})?\s+(\S+)", re.MULTILINE)


class Sample(NamedTuple):
    """One line of it."""

    name: str
    labels: dict[str, str]
    value: float


def read(metrics_url: str, timeout: float) -> list[Sample]:
    """All samples; none where nobody answers, or what answers speaks something else.

    Args:
        metrics_url: Triton's ``http://host:port/metrics``.
        timeout: seconds.
    """
    try:
        with urllib.request.urlopen(metrics_url, timeout=timeout) as answer:
            text = answer.read().decode(errors="replace")
        return [Sample(name, _labels(labels), float(value)) for name, labels, value in _LINE.findall(text)]
    except (OSError, http.client.HTTPException, ValueError):
        return []


def _labels(text: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', text))
