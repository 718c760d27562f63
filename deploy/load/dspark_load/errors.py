"""What a load test can fail with."""

from __future__ import annotations


class LoadError(Exception):
    """The message says what was expected, what came, and what to do."""
