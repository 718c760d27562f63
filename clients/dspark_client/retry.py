"""When and after how long a request is sent again, and how much time it has in all."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from numbers import Real

from dspark_client.errors import DSparkClientError, InvalidRequestError, ServerConnectionError, ServerUnavailableError


@dataclass(frozen=True)
class RetryPolicy:
    """Bounded exponential backoff with full jitter: the n-th wait is uniform in [0, min(initial * 2^n, max)] seconds.

    Only what never gave the caller a piece and failed as unreachable or unavailable is sent again.

    Raises:
        InvalidRequestError: a value lies outside its range.
    """

    max_attempts: int = 4
    """1 never sends again."""
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise InvalidRequestError(f"max_attempts: expected at least 1, got {self.max_attempts}")
        if not 0 < self.initial_backoff_s <= self.max_backoff_s:
            raise InvalidRequestError(
                "initial_backoff_s and max_backoff_s: expected 0 < initial <= max, "
                f"got {self.initial_backoff_s} and {self.max_backoff_s}"
            )

    def bound(self, attempt: int) -> float:
        """Longest wait in seconds after attempt number ``attempt`` (from 1)."""
        return min(self.initial_backoff_s * 2.0 ** min(attempt - 1, 63), self.max_backoff_s)

    def wait_after(
        self, error: DSparkClientError, attempt: int, *, started: bool, deadline: Deadline, rng: random.Random
    ) -> float | None:
        """Seconds to wait before the next attempt, or None if there must be none.

        Args:
            error: What attempt number ``attempt`` (from 1) ended with.
            started: A piece was already handed to the caller.
            deadline: No attempt begins after it.
            rng: Source of the jitter.
        """
        retryable = isinstance(error, ServerUnavailableError | ServerConnectionError)
        if started or not retryable or attempt >= self.max_attempts:
            return None
        wait = rng.uniform(0.0, self.bound(attempt))
        remaining = deadline.remaining()
        return wait if remaining is None or wait < remaining else None


_LONGEST_S = 1e9
"""gRPC takes a deadline some hundred years away for one that passed."""


@dataclass(frozen=True)
class Deadline:
    """A point of the monotonic clock, or none.

    Raises:
        InvalidRequestError: ``timeout_s`` is no number above 0.
    """

    timeout_s: float | None
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not (isinstance(self.timeout_s, Real) and self.timeout_s > 0):
            raise InvalidRequestError(f"timeout: expected a positive number of seconds, got {self.timeout_s!r}")

    def remaining(self) -> float | None:
        """Seconds left, at least 0 and no more than gRPC can count; None without a deadline."""
        if self.timeout_s is None:
            return None
        return min(max(0.0, self.started_s + self.timeout_s - time.monotonic()), _LONGEST_S)
