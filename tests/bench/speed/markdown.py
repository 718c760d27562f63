"""Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """The first ``left`` columns aligned to the left, the others to the right; columns padded for the eye."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(headings), line(rule), *map(line, rows)])


def number(value: float, places: int) -> str:
    """A number, or nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.{places}f}"
