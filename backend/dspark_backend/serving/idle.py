"""How many requests a server works on, from the engine's own gauges: Triton does not count decoupled requests."""

from __future__ import annotations

from dspark_backend.serving import samples

GAUGES = ("num_requests_running", "num_requests_waiting")


def requests_in_flight(metrics_url: str, timeout: float = 1.0) -> int | None:
    """Requests running and waiting on all models, or None where no model tells or the endpoint is gone.

    Args:
        metrics_url: Triton's ``http://host:port/metrics``.
        timeout: seconds.
    """
    values = [sample.value for sample in samples.read(metrics_url, timeout) if sample.name.endswith(GAUGES)]
    return round(sum(values)) if values else None
