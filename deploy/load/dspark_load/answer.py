"""One finished request, as the load tool saw it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """Times in seconds by one clock; counts from the server's last response."""

    sent: float
    first: float
    last: float
    """When the first and the last response with tokens came."""
    tokens: int
    rounds: int
    """Verification rounds after prefill."""
    verified: int
    """Draft tokens that the target checked."""
    accepted: int
    domain: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def decode_secs(self) -> float:
        return self.last - self.first

    @property
    def itl(self) -> float:
        """Mean time between tokens. A response carries several: their number counts, not that of responses."""
        return self.decode_secs / max(1, self.tokens - 1)

    @property
    def per_second(self) -> float:
        """Tokens a second of this user after the first."""
        return (self.tokens - 1) / self.decode_secs if self.decode_secs > 0 else 0.0

    def meets(self, ttft_limit: float, itl_limit: float) -> bool:
        return self.ttft <= ttft_limit and self.itl <= itl_limit
