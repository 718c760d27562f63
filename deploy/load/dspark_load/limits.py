"""What a request is promised."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Service level objective of one request, in seconds."""

    ttft: float
    itl: float
