"""``dspark-export engine``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from dspark_export.commands.progress import console, progress_bar
from dspark_export.engine.stage import EngineExport, export_engine
from dspark_export.errors import ExportError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def engine(
    stage: Annotated[Path, typer.Option(help="Directory that verifier or drafter wrote with --runtime tensorrt.")],
    out: Annotated[Path, typer.Option(help="Artifact directory, such as model_repository/verifier/1.")],
    profiles: Annotated[
        str, typer.Option(help="Sizes to build for: slots=16,prefill_chunk=512,block_size=7 (the defaults).")
    ] = "",
    precision: Annotated[str, typer.Option(help="Precision to expect; the stage's --dtype fixes it.")] = "",
    workspace: Annotated[str, typer.Option(help="Most scratch memory of a kernel, such as 2G; default all.")] = "",
    timing_cache: Annotated[
        Path | None, typer.Option(help="File with measured kernel times, read and written.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="GPUs, such as sm86,sm89 (tensorrt_rtx); default all that fit, or this machine's.")
    ] = "",
) -> None:
    """Build a stage's TensorRT engines, on this machine's GPU or ahead of time on a CPU."""
    options = EngineExport(stage, out, profiles, precision, _bytes(workspace), timing_cache, target)
    with progress_bar("read the stage") as progress:
        artifact, built = export_engine(options, progress)
    info = artifact.engine
    assert info is not None
    for one in built:
        console.print(f"{one.file}: {one.size / 2**20:.1f} MiB, {one.seconds:.1f} s", highlight=False)
    where = ", ".join(info.targets) or "this machine's GPU"
    console.print(
        f"{info.precision} by {info.builder} {info.version} for {where}: {len(info.profiles)} profiles in {out}",
        highlight=False,
        soft_wrap=True,
    )


def _bytes(text: str) -> int | None:
    if not text:
        return None
    found = re.fullmatch(r"(\d+)([kmg]?)(i?b)?", text.strip().lower())
    if found is None or int(found[1]) == 0:
        raise ExportError(f"--workspace: expected a size such as 512M or 2G, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]
