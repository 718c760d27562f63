"""Tokens a second of all users of one cell, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_load import interval
from dspark_load.interval import Estimate, Floats
from dspark_load.segment import Segment


@dataclass(frozen=True)
class Throughput:
    """Over the windows of a cell's segments."""

    value: float
    samples: Floats
    """[RESAMPLES] bootstrap values."""

    @property
    def estimate(self) -> Estimate:
        return interval.around(self.value, self.samples)

    def over(self, other: Throughput) -> Estimate:
        """The quotient of two, measured independently."""
        return interval.around(self.value / other.value, self.samples / other.samples)


def measured(segments: Sequence[Segment], seed: int = 0) -> Throughput:
    """Tokens that arrived in the windows over their length.

    A closed loop with N streams makes N * tokens / latency (Little's law), so its uncertainty is that of the answers'
    tokens over latencies, resampled. In an open loop arrivals decide: slices of the windows are resampled.
    """
    value = sum(sum(segment.slices) for segment in segments) / sum(segment.seconds for segment in segments)
    if segments[0].cell.load.mode == "open":
        rates = [count * len(segment.slices) / segment.seconds for segment in segments for count in segment.slices]
        return Throughput(value, interval.resampled(rates, interval.mean, seed))
    answers = [answer for segment in segments for answer in segment.counted]
    tokens = [float(answer.tokens) for answer in answers]
    latencies = [answer.last - answer.sent for answer in answers]
    relative = interval.resampled_quotient(tokens, latencies, seed) * (sum(latencies) / sum(tokens))
    return Throughput(value, value * relative)
