"""``dspark-export verifier``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dspark_export.commands.layer_ids import layer_ids
from dspark_export.commands.plan import show_plan
from dspark_export.commands.progress import console, progress_bar
from dspark_export.errors import ExportError
from dspark_export.tensorrt_graphs import RUNTIME as TENSORRT
from dspark_export.verifier import CALIBRATION_TOKENS, DEFAULT_MAX_CONTEXT, GPTQ, VerifierExport, export_verifier

_CALIBRATION = " or ".join(f"{tokens} for {dtype}" for dtype, tokens in CALIBRATION_TOKENS.items())


def verifier(
    model: Annotated[str, typer.Option(help="Hugging Face folder, .gguf file, or smollm2-135m (its package's file).")],
    out: Annotated[Path, typer.Option(help="Artifact directory, such as model_repository/verifier/1.")],
    dtype: Annotated[
        str, typer.Option(help="Precision: int8, or storage float32, float16 or bfloat16; tensorrt: also fp8 or int4.")
    ] = "float32",
    runtime: Annotated[str, typer.Option(help="What will run it: onnxruntime or tensorrt.")] = "onnxruntime",
    target_layer_ids: Annotated[
        str, typer.Option(help="Layers whose outputs a drafter reads, such as 1,8,14; default a spread of five.")
    ] = "",
    max_context: Annotated[
        int | None, typer.Option(help=f"Longest sequence; default the model's own, at most {DEFAULT_MAX_CONTEXT}.")
    ] = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="For int8 and int4: prompt file to calibrate with; default our own dialogues.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help=f"For both: tokens of it to calibrate with; default {_CALIBRATION}.")
    ] = None,
    check_tokens: Annotated[
        int, typer.Option(help="For both: tokens of the rest on which it is compared with float32.")
    ] = 20_000,
    rounding: Annotated[
        str, typer.Option(help="For int4: gptq, or nearest, which needs no calibration and is worse.")
    ] = GPTQ,
    check_against_transformers: Annotated[
        bool, typer.Option("--check-against-transformers", help="Compare logits with transformers (needs torch).")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run a text through the result; needs its size in float32.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would need; see plan.")] = False,
) -> None:
    """Export a target model."""
    begin = time.perf_counter()
    if check_against_transformers and runtime == TENSORRT:
        raise ExportError("--check-against-transformers: expected --runtime onnxruntime; nothing here runs an engine")
    options = VerifierExport(
        model, out, dtype, runtime, layer_ids(target_layer_ids), max_context,
        calibration_text, calibration_tokens, check_tokens, rounding, check, check_against_transformers,
    )  # fmt: skip
    if dry_run:
        show_plan(model, dtype=dtype, context=max_context, taps=options.target_layer_ids)
        return
    with progress_bar("read the checkpoint") as progress:
        exported = export_verifier(options, progress)
    artifact, quality = exported.artifact, exported.quality
    size = sum(artifact.files.values()) / 2**20
    console.print(
        f"{artifact.family} with {artifact.num_layers} layers, taps {list(artifact.target_layer_ids)}, context "
        f"{artifact.max_context}: {size:.0f} MiB in {out}, {time.perf_counter() - begin:.1f} s",
        highlight=False,
    )
    if quality is not None:
        console.print(
            f"{dtype} against float32 on {quality.tokens} held-out tokens: KL {quality.kl:.4f}, same most probable "
            f"token at {quality.top1:.1%}",
            highlight=False,
        )
    if exported.comparison is not None:
        compared = exported.comparison
        console.print(
            f"against transformers, {compared.tokens} tokens: largest difference of logits "
            f"{compared.largest_difference:.1e}, same argmax at {compared.same_argmax:.1%}",
            highlight=False,
        )
