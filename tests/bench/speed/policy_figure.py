"""The picture of the table of policies: speed of a stream by streams, and its ratio to no speculation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from speed.policy_rows import Row


def draw(png: Path, rows: Sequence[Row]) -> None:
    """A column a precision: lines above, ratios to ``off`` below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    precisions = list(dict.fromkeys(row.cell.precision for row in rows))
    policies = list(dict.fromkeys(row.cell.policy for row in rows))
    streams = sorted({row.cell.streams for row in rows})
    colours = {policy: f"C{index}" for index, policy in enumerate(policies)}
    figure = Figure(figsize=(1 + 5.5 * len(precisions), 7), layout="constrained")
    grid = figure.subplots(2, len(precisions), squeeze=False, sharex="col", sharey="row")
    for column, precision in enumerate(precisions):
        speeds, ratios = grid[0][column], grid[1][column]
        for place, policy in enumerate(policies):
            mine = [row for row in rows if row.cell.precision == precision and row.cell.policy == policy]
            mine.sort(key=lambda row: row.cell.streams)
            where = [streams.index(row.cell.streams) for row in mine]
            speeds.plot(where, [row.per_user for row in mine], marker="o", color=colours[policy], label=policy)
            if policy == "off":
                continue
            width = 0.9 / max(1, len(policies) - 1)
            shift = (place - policies.index("off") - 1 if "off" in policies else place) * width - 0.45 + width / 2
            for x, row in zip(where, mine, strict=True):
                if not math.isnan(row.to_off):
                    ratios.bar(x + shift, row.to_off, width, color=colours[policy])
                    label = f"{row.to_off:.2f}"
                    ratios.text(x + shift, row.to_off, label, ha="center", va="bottom", fontsize=7, rotation=90)
        speeds.set(title=precision, ylabel="tokens/s per user")
        speeds.legend()
        ratios.axhline(1.0, color="C7", linewidth=0.8)
        ratios.set(ylabel="speed over off")
        ratios.margins(y=0.15)
        for axes in (speeds, ratios):
            axes.set(xlabel="streams" if axes is ratios else "", xticks=range(len(streams)), xticklabels=streams)
            axes.grid(alpha=0.3, axis="y")
    # Once for all: the first limit that is set ends the scaling of the axes that share it.
    grid[0][0].set_ylim(0, 1.05 * max(row.per_user for row in rows))
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(png)
