"""Curves of a run: two CSV files that grow, and a picture of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from dspark_export.figures import figure_panels

STEPS_FILE = "steps.csv"
HELD_OUT_FILE = "held_out.csv"
PICTURE_FILE = "curves.png"
STEP_COLUMNS = (
    "step", "seen_tokens", "seconds", "loss", "ce", "l1", "confidence", "matched", "gradient_norm", "learning_rate",
)  # fmt: skip
_LENGTH = "accepted_length"
_DOMAIN = "accepted_"


def held_out_columns(block_size: int, domains: Sequence[str]) -> tuple[str, ...]:
    """Columns of the held-out file: ``stands_k`` is the conditional acceptance of draft k."""
    slots = (f"stands_{k + 1}" for k in range(block_size))
    return ("step", "seen_tokens", "seconds", _LENGTH, *slots, *(_DOMAIN + domain for domain in domains))


class Curve:
    """A CSV file with a row a point, the step first."""

    def __init__(self, path: Path, columns: Sequence[str], up_to_step: int) -> None:
        """Continue the file after ``up_to_step``: rows of steps that a kill undid are dropped."""
        self._path = path
        self._columns = tuple(columns)
        kept = [row for row in read_rows(path) if int(row["step"]) <= up_to_step] if up_to_step else []
        self.last_step = int(kept[-1]["step"]) if kept else -1
        """Of the row that was added last; -1 before the first."""
        scratch = path.with_suffix(".tmp")
        with scratch.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(self._columns)
            writer.writerows([row.get(column, "") for column in self._columns] for row in kept)
        scratch.replace(path)

    def add(self, step: int, *values: float) -> None:
        """Append a row."""
        cells = [value if isinstance(value, int) else f"{value:.6g}" for value in values]
        with self._path.open("a", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerow([step, *cells])
        self.last_step = step


def read_rows(path: Path) -> list[dict[str, str]]:
    """All complete rows of a CSV file with a header; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        # A kill may have cut the last line.
        return [row for row in csv.DictReader(stream) if None not in row and None not in row.values()]


def draw_curves(directory: Path) -> None:
    """Loss and held-out accepted length over the hours. Raises ExportError where matplotlib is not installed."""
    steps, held_out = read_rows(directory / STEPS_FILE), read_rows(directory / HELD_OUT_FILE)
    with figure_panels(directory / PICTURE_FILE, (9.0, 3.6), 1, 2) as [[left, right]]:
        hours = [float(row["seconds"]) / 3600 for row in steps]
        for column in ("loss", "l1", "confidence"):
            left.plot(hours, _smooth([float(row[column]) for row in steps]), label=column, linewidth=1.0)
        left.set(xlabel="hours", ylabel="loss")
        left.legend(fontsize="small")
        spent = [float(row["seconds"]) / 3600 for row in held_out]
        right.plot(spent, _numbers(held_out, _LENGTH), marker="o", markersize=3, label="all")
        columns = held_out[0] if held_out else {}
        domains = [column for column in columns if column.startswith(_DOMAIN) and column != _LENGTH]
        for column in domains if len(domains) > 1 else ():
            right.plot(spent, _numbers(held_out, column), linewidth=1.0, label=column.removeprefix(_DOMAIN))
        right.legend(fontsize="small")
        right.set(xlabel="hours", ylabel="held-out accepted length (greedy)")
        for axes in (left, right):
            axes.grid(alpha=0.3)


def _numbers(rows: Sequence[dict[str, str]], column: str) -> list[float]:
    """nan where a row has none: other text was held out then."""
    return [float(row[column] or "nan") for row in rows]


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential mean, without the bias of its start."""
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        smooth.append(mean / weight)
    return smooth
