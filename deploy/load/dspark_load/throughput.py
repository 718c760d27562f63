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
        """The quotient of two. Where both were measured in as many parts, part by part."""
        return interval.around(self.value / other.value, self.samples / other.samples)


def measured(segments: Sequence[Segment], seed: int = 0) -> Throughput:
    """Tokens that arrived in the windows over their length.

    A closed loop with N streams makes N * tokens / latency (Little's law), so its uncertainty is that of the answers'
    tokens over latencies, resampled. In an open loop arrivals decide, which perf_analyzer draws alike for every part:
    slices are resampled, those of one place together, for a second part of the same arrivals says nothing new of them.
    """
    seconds = sum(segment.seconds for segment in segments)
    value = sum(sum(segment.slices) for segment in segments) / seconds
    if segments[0].cell.load.mode == "open":
        places = zip(*(segment.slices for segment in segments), strict=True)
        rates = [sum(counts) * len(segments[0].slices) / seconds for counts in places]
        return Throughput(value, interval.resampled(rates, interval.mean, seed))
    counted = [segment.counted for segment in segments]
    answers = [answer for part in counted for answer in part]
    tokens = [float(answer.tokens) for answer in answers]
    latencies = [answer.last - answer.sent for answer in answers]
    sizes = [len(part) for part in counted]
    relative = interval.resampled_quotient(tokens, latencies, seed, sizes) * (sum(latencies) / sum(tokens))
    return Throughput(value, value * relative)
