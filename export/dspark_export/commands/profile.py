"""``dspark-export profile``: measure step times ahead of the first load, show them, and keep them for the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.cost_cache import CostCache, default_cache_directory, fingerprint
from dspark_backend.errors import ConfigError
from dspark_backend.profile_grid import ProfilePlan
from dspark_backend.profiling import measure
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.commands.progress import progress_bar
from dspark_export.cost_plot import draw_cost

_PLAN = ProfilePlan()


def profile(
    verifier: Annotated[Path, typer.Option(help="Artifact directory of the verifier.")],
    drafter: Annotated[Path | None, typer.Option(help="Artifact directory of the drafter.")] = None,
    max_slots: Annotated[int, typer.Option(help="Most requests in a step: the server's max_slots.")] = _PLAN.max_slots,
    threads: Annotated[int, typer.Option(help="The server's threads; 0 takes one a core.")] = 0,
    max_seconds: Annotated[float, typer.Option(help="About how long to measure.")] = _PLAN.max_seconds,
    out: Annotated[
        Path | None, typer.Option(help="Cache directory; default $XDG_CACHE_HOME/dspark/cost, as the server's.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this PNG.")] = None,
) -> None:
    """Measure how long steps take on this machine, for the scheduler. Run it where, and as, the server will run."""
    try:
        plan = ProfilePlan(max_slots=max_slots, max_seconds=max_seconds)
    except ValueError as error:
        raise ConfigError(f"profile: {error}") from None
    target = OnnxRuntimeVerifier(verifier, threads)
    draft = OnnxRuntimeDrafter(drafter, verifier, threads) if drafter else None
    cache = CostCache(
        out or default_cache_directory(),
        fingerprint(target.artifact, draft.artifact if draft else None, threads, plan),
    )
    try:
        model = _measure(target, draft, plan)
    finally:
        target.close()
        if draft is not None:
            draft.close()
    cache.store(model)
    console = Console()
    for capacity in sorted({curve.capacity for curve in model.verify}):
        console.print(cost_table(model, capacity))
    if plot is not None:
        draw_cost(model, plot)
        console.print(f"curves drawn in {plot}", highlight=False, soft_wrap=True)
    kept = f"kept as {cache.path}" if cache.path else "not kept: no cache directory; name one with --out"
    console.print(kept, highlight=False, soft_wrap=True)


def cost_table(model: CostModel, capacity: int) -> Table:
    """Measured times at one capacity, a line for each R: the draft, then each q with its B and tokens a second."""
    curves = sorted(
        (curve for curve in model.verify if curve.capacity == capacity), key=lambda curve: curve.num_requests
    )
    table = Table(title=f"capacity {capacity}: tokens in the step, ms, tokens/s where all drafts are accepted")
    table.add_column("requests", justify="right")
    if model.draft:
        table.add_column("draft of 1 .. all", justify="right")
    for depth in curves[0].tokens_each:
        table.add_column(f"{depth - 1} drafts" if depth != 2 else "1 draft", justify="right")
    for curve in curves:
        table.add_row(*_cells(model, curve))
    return table


def _cells(model: CostModel, curve: StepCurve) -> list[str]:
    def draft(width: int) -> float:
        return model.draft_seconds(curve.num_requests, curve.capacity, width)

    cells = [str(curve.num_requests)]
    if model.draft:
        widths = model.draft[0].tokens_each
        cells.append(" .. ".join(f"{1e3 * draft(width):.2f}" for width in widths) + " ms")
    for each, seconds in zip(curve.tokens_each, curve.seconds, strict=True):
        tokens = curve.num_requests * each
        # Without drafts to verify the drafter does not run.
        whole = seconds + (draft(each - 1) if each > 1 else 0.0)
        cells.append(f"{tokens}: {1e3 * seconds:.2f} ms\n{tokens / whole:.0f}/s")
    return cells


def _measure(target: OnnxRuntimeVerifier, draft: OnnxRuntimeDrafter | None, plan: ProfilePlan) -> CostModel:
    with progress_bar("warm up") as progress:
        return measure(target, draft, plan, progress)
