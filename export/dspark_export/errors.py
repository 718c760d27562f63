"""Errors of the export tools."""

from __future__ import annotations

from dspark_backend.errors import DSparkError


class ExportError(DSparkError):
    """The export cannot go on; the message says what was expected, what was found and what to do."""
