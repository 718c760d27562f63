"""How many requests a server works on, from the engine's own gauges: Triton does not count decoupled requests."""

from __future__ import annotations

from dspark_client import prometheus
from dspark_client.errors import DSparkClientError

GAUGES = ("num_requests_running", "num_requests_waiting")


def requests_in_flight(metrics_url: str, timeout: float = 1.0) -> int | None:
    """Requests running and waiting on all models, or None where no model tells or the endpoint is gone.

    Args:
        metrics_url: Triton's ``http://host:port/metrics``.
        timeout: seconds.
    """
    try:
        samples = prometheus.fetch(metrics_url, "", timeout)
    except DSparkClientError:
        return None
    values = [sample.value for sample in samples if sample.name.endswith(GAUGES)]
    return round(sum(values)) if values else None
