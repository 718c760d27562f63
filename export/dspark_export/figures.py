"""The paper's figures as PNG files. matplotlib is imported when one is drawn, and never opens a window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark_export.calibrate import REGIMES, ReliabilityCurve
from dspark_export.errors import ExportError
from dspark_export.evaluate import ConditionalAcceptance, SweepRow

_BEFORE, _AFTER = "tab:orange", "tab:blue"
_DPI = 120


def draw_reliability(png: Path, before: Sequence[ReliabilityCurve], after: Sequence[ReliabilityCurve]) -> None:
    """Figure 6: predicted survival against observed acceptance, a panel a position, a row a regime.

    The area of a point is proportional to its bin's share of the rounds.

    Raises:
        ExportError: no curves, or matplotlib is not installed.
    """
    if not before or not after:
        raise ExportError("expected at least one reliability curve before and after calibration, got none")
    regimes = [regime for regime in REGIMES if any(curve.regime == regime for curve in after)]
    positions = sorted({curve.position for curve in after})
    size = (2.1 * len(positions) + 0.8, 2.3 * len(regimes) + 0.6)
    with figure_panels(png, size, len(regimes), len(positions)) as panels:
        for curves, colour, label in ((before, _BEFORE, "before"), (after, _AFTER, "after")):
            for curve in curves:
                axes = panels[regimes.index(curve.regime)][positions.index(curve.position)]
                total = sum(row.count for row in curve.rows)
                axes.plot(
                    [row.mean_predicted for row in curve.rows],
                    [row.observed_rate for row in curve.rows],
                    color=colour,
                    linewidth=1.0,
                )
                axes.scatter(
                    [row.mean_predicted for row in curve.rows],
                    [row.observed_rate for row in curve.rows],
                    s=[8 + 120 * row.count / total for row in curve.rows],
                    color=colour,
                    alpha=0.6,
                    label=label,
                )
        for row, regime in zip(panels, regimes, strict=True):
            for axes, position in zip(row, positions, strict=True):
                axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--")
                axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=f"draft {position}")
                axes.label_outer()
            row[0].set_ylabel(f"{regime}\nobserved acceptance")
        for axes in panels[-1]:
            axes.set_xlabel("predicted")
        panels[0][0].legend(loc="upper left", fontsize="small")


def draw_conditional_acceptance(png: Path, rates: Mapping[str, Sequence[ConditionalAcceptance]]) -> None:
    """Figure 2: acceptance of a draft where all before it stood, by position; a line a prompt file.

    Raises:
        ExportError: no rates, or matplotlib is not installed.
    """
    if not any(rates.values()):
        raise ExportError("expected acceptance rates of at least one prompt file, got none")
    with figure_panels(png, (5.2, 3.6), 1, 1) as panels:
        axes = panels[0][0]
        for name, row in rates.items():
            cells = [cell for cell in row if not math.isnan(cell.rate)]
            axes.plot([cell.position for cell in cells], [cell.rate for cell in cells], marker="o", label=name)
        axes.set(xlabel="position in the block", ylabel="conditional acceptance", ylim=(0, 1.02))
        axes.set_xticks(range(1, max(map(len, rates.values())) + 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def draw_threshold_sweep(png: Path, rows: Sequence[SweepRow]) -> None:
    """Figure 5: accepted length, and verified tokens for each accepted one, by threshold.

    Raises:
        ExportError: no rows, or matplotlib is not installed.
    """
    if not rows:
        raise ExportError("expected at least one threshold, got none")
    with figure_panels(png, (5.2, 3.6), 1, 1) as panels:
        left = panels[0][0]
        right = left.twinx()
        thresholds = [row.threshold for row in rows]
        lines = [
            *left.plot(thresholds, [row.accepted_length for row in rows], "o-", color=_AFTER, label="accepted length"),
            *right.plot(
                thresholds,
                [row.verified_per_accepted for row in rows],
                "s-",
                color=_BEFORE,
                label="verified per accepted",
            ),
        ]
        left.set(xlabel="threshold on the survival", ylabel="accepted length (tokens a round)")
        right.set_ylabel("verified tokens per accepted")
        left.grid(alpha=0.3)
        left.legend(lines, [line.get_label() for line in lines], fontsize="small", loc="best")


@contextmanager
def figure_panels(png: Path, size: tuple[float, float], rows: int, columns: int) -> Iterator[list[list[Any]]]:
    """Panels [rows][columns] that are written to ``png`` at the end."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExportError(
            "drawing figures needs matplotlib, which is not installed; run: pip install 'dspark-triton[plot]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    # The canvas is named, so that no display and no global state of matplotlib is involved.
    FigureCanvasAgg(figure)
    yield [list(row) for row in figure.subplots(rows, columns, squeeze=False)]
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=_DPI)
