"""How many requests a server works on, from the engine's own gauges: Triton does not count decoupled requests."""

from __future__ import annotations

import re
import urllib.request

_GAUGE = re.compile(r"^\w*num_requests_(?:running|waiting)(?:\{[^}]*\})?\s+(\S+)", re.MULTILINE)


def requests_in_flight(metrics_url: str, timeout: float = 1.0) -> int | None:
    """Requests running and waiting on all models, or None where no model tells or the endpoint is gone.

    Args:
        metrics_url: Triton's ``http://host:port/metrics``.
        timeout: seconds.
    """
    try:
        with urllib.request.urlopen(metrics_url, timeout=timeout) as answer:
            values = _GAUGE.findall(answer.read().decode(errors="replace"))
    except OSError:
        return None
    return round(sum(float(value) for value in values)) if values else None
