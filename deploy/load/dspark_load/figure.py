"""The two pictures of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark_load.interval import Estimate
from dspark_load.row import Row


def _spread(estimates: Sequence[Estimate]) -> NDArray[np.float64]:
    """[2, n] distances to the ends of the intervals."""
    return np.array([[one.value - one.low for one in estimates], [one.high - one.value for one in estimates]]).clip(0)


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    closed = [row for row in rows if row.cell.load.mode == "closed"]
    policies = dict.fromkeys(row.cell.policy for row in closed)
    return {
        policy: sorted((row for row in closed if row.cell.policy == policy), key=lambda row: row.cell.load.value)
        for policy in sorted(policies)
    }


def pareto(png: Path, rows: Sequence[Row]) -> None:
    """Throughput over the speed of a user, a line a policy, points labelled by streams (the paper's figure 7)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for policy, mine in _groups(rows).items():
        users, totals = [row.per_user for row in mine], [row.aggregate for row in mine]
        x, y = [one.value for one in users], [one.value for one in totals]
        axes.errorbar(x, y, xerr=_spread(users), yerr=_spread(totals), marker="o", capsize=2, linewidth=1, label=policy)
        for row, left, up in zip(mine, x, y, strict=True):
            label = f"{row.cell.load.value:g}"
            axes.annotate(label, (left, up), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="tokens/s per user", ylabel="tokens/s in all", xlim=(0, None), ylim=(0, None))
    axes.set_title("Points: streams; bars: 95% intervals", fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(png, dpi=110)


def budget(png: Path, rows: Sequence[Row]) -> None:
    """Throughput, and tokens verified a round of a request, by streams (the paper's figure 8)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels: tuple[tuple[str, Callable[[Row], Estimate]], ...] = (
        ("tokens/s in all", lambda row: row.aggregate),
        ("verify budget: tokens a round of a request", lambda row: row.budget),
    )
    for axes, (label, value) in zip(figure.subplots(1, 2), panels, strict=True):
        ticks = sorted({row.cell.load.value for row in rows if row.cell.load.mode == "closed"})
        for policy, mine in _groups(rows).items():
            estimates = [value(row) for row in mine]
            places = [row.cell.load.value for row in mine]
            heights = [one.value for one in estimates]
            axes.errorbar(places, heights, yerr=_spread(estimates), marker="o", capsize=2, linewidth=1, label=policy)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="streams", ylabel=label, ylim=(0, None), xticks=ticks, xticklabels=[f"{t:g}" for t in ticks])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(png, dpi=110)
