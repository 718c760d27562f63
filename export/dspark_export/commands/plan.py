"""``dspark-export plan``, and ``--dry-run`` of the exports."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from dspark_backend.stages.artifact import load_verifier_artifact, mismatch
from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.gpus import find_gpu
from dspark_export.layouts import describe_checkpoint
from dspark_export.planner import PRECISIONS, ModelSize, Plan, Precision, drafter_size
from dspark_export.planner import plan as make_plan
from dspark_export.source import open_weights, resolve_model
from dspark_export.verifier import DEFAULT_MAX_CONTEXT, taps_of
from dspark_export.weights import require_unquantised


def plan(
    model: Annotated[str, typer.Option(help="Folder with the target's config.json; weights are not needed.")],
    drafter: Annotated[Path | None, typer.Option(help="Folder with the drafter's config.json.")] = None,
    gpu: Annotated[str, typer.Option(help="Memory such as 24GiB, or a name such as L4 or A100-80GB.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, int8, fp8 or int4.")] = "bfloat16",
    context: Annotated[
        int | None,
        typer.Option(help=f"Positions a slot holds; default the model's own, at most {DEFAULT_MAX_CONTEXT}."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a model and its drafter need, before anything is downloaded or built."""
    show_plan(model, drafter, gpu, dtype, context, as_json)


def show_plan(
    model: str,
    drafter: Path | None = None,
    gpu: str = "",
    dtype: str = "bfloat16",
    context: int | None = None,
    as_json: bool = False,
    taps: tuple[int, ...] | None = None,
) -> None:
    """Print a plan to stdout. Raises ExportError where it cannot be made."""
    path = resolve_model(model)
    config = open_weights(path).config
    decoder = describe(config)
    require_unquantised(config, f"model {path.name}")
    taps_of(decoder, taps)
    made = make_plan(
        decoder,
        None if drafter is None else describe_checkpoint(open_weights(drafter).config),
        cast(Precision, dtype),
        min(decoder.max_position, DEFAULT_MAX_CONTEXT) if context is None else context,
        find_gpu(gpu) if gpu else None,
    )
    if as_json:
        typer.echo(json.dumps(asdict(made) | {"disk_bytes": made.disk_bytes}, indent=2))
    else:
        _print(made)


def show_drafter_plan(checkpoint: Path, verifier: Path, dtype: str) -> None:
    """Print what a drafter needs beside an exported verifier; its weights need not be there.

    Raises:
        ExportError: the drafter is of another target, or of a kind that cannot be built.
        ArtifactError: the verifier's artifact is missing or damaged.
    """
    artifact = load_verifier_artifact(verifier, check_contents=False)
    spec = describe_checkpoint(open_weights(checkpoint).config)
    reason = mismatch(
        checkpoint.name, spec.decoder.vocab_size, spec.decoder.hidden_size, spec.target_layer_ids, artifact
    )
    if reason is not None:
        raise ExportError(reason)
    if dtype not in PRECISIONS:
        raise ExportError(f"--dtype: expected one of {', '.join(PRECISIONS)}, got {dtype!r}")
    size = drafter_size(spec, dtype)
    _print_sizes(f"{checkpoint.name} for {artifact.source}, {dtype}", [("drafter", size)], artifact.max_context)


def _print(made: Plan) -> None:
    console = Console()
    models: list[tuple[str, ModelSize]] = [("target", made.target)]
    if made.drafter is not None:
        models.append(("drafter", made.drafter))
    _print_sizes(f"{made.family}, {made.precision}, context {made.context}", models, made.context)
    console.print(f"disk in all {_gib(made.disk_bytes)}; workspace of the largest step {_gib(made.workspace_bytes)}")
    if made.gpu is not None and made.gpu_bytes is not None:
        fits = f"{made.slots} slots of {made.context} tokens" if made.slots else "does not fit"
        console.print(f"{made.gpu}, {_gib(made.gpu_bytes)}: {fits}", highlight=False)
    console.print("engine profiles, tokens of a step (least/best/most):", highlight=False)
    for engine in dict.fromkeys(profile.engine for profile in made.profiles):
        own = (profile for profile in made.profiles if profile.engine == engine)
        shapes = ", ".join(f"{profile.name} {profile.low}/{profile.best}/{profile.high}" for profile in own)
        console.print(f"  {engine}: {shapes}", highlight=False)


def _print_sizes(title: str, models: list[tuple[str, ModelSize]], context: int) -> None:
    table = Table(title=title)
    table.add_column("")
    for name, _ in models:
        table.add_column(name, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("parameters", [f"{size.parameters / 1e9:.3f} B" for _, size in models]),
        *(
            (f"weights, {precision}", [_gib(size.weight_bytes[precision]) for _, size in models])
            for precision in PRECISIONS
        ),
        ("K/V a token", [f"{size.cache_bytes_per_token / 1024:.0f} KiB" for _, size in models]),
        (f"K/V of {context} tokens", [_gib(size.cache_bytes_per_token * context) for _, size in models]),
        ("disk: download (bfloat16)", [_gib(size.download_bytes) for _, size in models]),
        ("disk: artifact", [_gib(size.artifact_bytes) for _, size in models]),
        ("disk: engine", [_gib(size.engine_bytes) for _, size in models]),
    ]
    for label, cells in rows:
        table.add_row(label, *cells)
    Console().print(table)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
