"""What the server tells about its models."""

from __future__ import annotations

from dataclasses import dataclass

from tritonclient.grpc import service_pb2


@dataclass(frozen=True)
class ModelInfo:
    """One entry of the model repository."""

    name: str
    version: str
    state: str
    """READY, UNAVAILABLE, LOADING, ...; empty if it was never loaded."""
    reason: str


@dataclass(frozen=True)
class Timing:
    """How often something happened and how long it took in all, in nanoseconds."""

    count: int
    total_ns: int


@dataclass(frozen=True)
class ModelStatistics:
    """Triton's own counts of one version of a model.

    Triton measures a decoupled model's times only up to the hand-over to the model, and counts cancelled requests as
    successes; the server's ``dspark_*`` metrics are exact.
    """

    name: str
    version: str
    last_inference_ms: int
    """Milliseconds since the epoch; 0 for never."""
    inferences: int
    executions: int
    success: Timing
    fail: Timing
    queue: Timing


def models_of(response: service_pb2.RepositoryIndexResponse) -> list[ModelInfo]:
    return [ModelInfo(m.name, m.version, m.state, m.reason) for m in response.models]


def statistics_of(response: service_pb2.ModelStatisticsResponse) -> list[ModelStatistics]:
    return [
        ModelStatistics(
            name=model.name,
            version=model.version,
            last_inference_ms=model.last_inference,
            inferences=model.inference_count,
            executions=model.execution_count,
            success=_timing(model.inference_stats.success),
            fail=_timing(model.inference_stats.fail),
            queue=_timing(model.inference_stats.queue),
        )
        for model in response.model_stats
    ]


def _timing(duration: service_pb2.StatisticDuration) -> Timing:
    return Timing(count=duration.count, total_ns=duration.ns)
