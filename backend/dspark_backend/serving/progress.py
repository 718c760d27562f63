"""What a model has done so far, by the engine's own counters: they stand still when the engine or its stub is dead."""

from __future__ import annotations

from dspark_backend.serving import samples

COUNTERS = ("dspark_steps_total", "dspark_prompt_tokens_total", "dspark_generation_tokens_total")


def work_done(metrics_url: str, model: str, timeout: float = 2.0) -> float | None:
    """Steps and tokens of ``model``, or None where nobody tells.

    Args:
        metrics_url: Triton's ``http://host:port/metrics``.
        model: whose counters; another model's work does not show that this one lives.
        timeout: seconds.
    """
    values = [
        sample.value
        for sample in samples.read(metrics_url, timeout)
        if sample.name in COUNTERS and sample.labels.get("model") == model
    ]
    return sum(values) if values else None
