"""What a model has done so far, by the engine's own counters: they stand still when the engine or its stub is dead."""

from __future__ import annotations

from dspark_client import prometheus
from dspark_client.errors import DSparkClientError

COUNTERS = ("dspark_steps_total", "dspark_prompt_tokens_total", "dspark_generation_tokens_total")


def work_done(metrics_url: str, model: str, timeout: float = 2.0) -> float | None:
    """Steps and tokens of ``model``, or None where nobody tells.

    Args:
        metrics_url: Triton's ``http://host:port/metrics``.
        model: whose counters; another model's work does not show that this one lives.
        timeout: seconds.
    """
    try:
        samples = prometheus.fetch(metrics_url, "dspark_", timeout)
    except DSparkClientError:
        return None
    values = [sample.value for sample in samples if sample.name in COUNTERS and ("model", model) in sample.labels]
    return sum(values) if values else None
