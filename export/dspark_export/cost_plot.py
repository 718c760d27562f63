"""Draws a cost model: steps a second against tokens in the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dspark_backend.cost import CostModel
from dspark_export.errors import ExportError


def draw_cost(model: CostModel, path: Path) -> None:
    """Write SPS(B) as a PNG: a panel for each capacity, a curve for each number of requests.

    Raises:
        ExportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExportError(
            "--plot: expected matplotlib, which is not installed; pip install 'dspark-triton[plot]'"
        ) from error
    capacities = sorted({curve.capacity for curve in model.verify})
    figure = Figure(figsize=(5.0 * len(capacities), 4.0), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(capacities), sharey=True))
    for axis, capacity in zip(axes, capacities, strict=True):
        curves = (curve for curve in model.verify if curve.capacity == capacity)
        for curve in sorted(curves, key=lambda curve: curve.num_requests):
            tokens = curve.num_requests * np.array(curve.tokens_each)
            axis.plot(tokens, 1.0 / np.array(curve.seconds), marker="o", label=str(curve.num_requests))
        drafts = sorted(
            (curve.num_requests, 1.0 / curve.seconds[0]) for curve in model.draft if curve.capacity == capacity
        )
        if drafts:
            counts, rates = zip(*drafts, strict=True)
            axis.plot(counts, rates, linestyle="--", marker="x", color="black", label="drafting, by R")
        axis.set(title=f"capacity {capacity}", xlabel="tokens in the step, B", xscale="log", yscale="log")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(title="requests R", fontsize="small")
    axes[0].set_ylabel("steps a second, SPS(B)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
