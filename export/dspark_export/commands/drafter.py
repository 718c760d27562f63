"""``dspark-export drafter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_export.commands.plan import show_drafter_plan
from dspark_export.commands.progress import console, progress_bar
from dspark_export.drafter import DrafterExport, export_drafter


def drafter(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a DSpark drafter: config.json and safetensors.")],
    verifier: Annotated[Path, typer.Option(help="Artifact directory of the verifier it was made for.")],
    out: Annotated[Path, typer.Option(help="Artifact directory, such as model_repository/drafter/1.")],
    dtype: Annotated[
        str, typer.Option(help="Precision: int8, or storage float32, float16 or bfloat16; tensorrt: also fp8 or int4.")
    ] = "float32",
    runtime: Annotated[str, typer.Option(help="What will run it: onnxruntime or tensorrt.")] = "onnxruntime",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would need; see plan.")] = False,
) -> None:
    """Export a drafter for an exported verifier."""
    options = DrafterExport(checkpoint, verifier, out, dtype, runtime)
    if dry_run:
        show_drafter_plan(checkpoint, verifier, dtype)
        return
    with progress_bar("read the checkpoint") as progress:
        artifact = export_drafter(options, progress)
    size = sum(artifact.files.values()) / 2**20
    console.print(
        f"{artifact.markov_head} head, block {artifact.block_size}, {artifact.num_layers} layers, "
        f"{artifact.draft_vocab_size} of {artifact.vocab_size} tokens: {size:.0f} MiB in {out}",
        highlight=False,
        soft_wrap=True,
    )
