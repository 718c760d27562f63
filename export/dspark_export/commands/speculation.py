"""``dspark-export calibrate`` and ``evaluate``: both run prompts through the engine and look at its rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_backend.calibration import CALIBRATION_FILE, load_calibration
from dspark_backend.stages.artifact import load_drafter_artifact
from dspark_backend.telemetry import RoundRecord
from dspark_export.calibrate import calibrate as fit_calibration
from dspark_export.calibrate import calibration_table
from dspark_export.collect import CollectPlan, collect_rounds
from dspark_export.commands.progress import progress_bar
from dspark_export.evaluate import (
    accepted_length_table,
    accepted_lengths,
    conditional_acceptance,
    conditional_acceptance_table,
    threshold_sweep,
    threshold_table,
)
from dspark_export.figures import draw_conditional_acceptance, draw_reliability, draw_threshold_sweep
from dspark_export.prompts import read_prompts
from dspark_export.rounds import RoundTable

Verifier = Annotated[Path, typer.Option(help="Artifact directory of the verifier.")]
Drafter = Annotated[Path, typer.Option(help="Artifact directory of the drafter.")]
Prompts = Annotated[list[Path], typer.Option(help="Prompt file (JSON lines or text); may be repeated.")]
PerFile = Annotated[int | None, typer.Option(min=1, help="Prompts of each file; default all.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of each answer.")]
Threads = Annotated[int, typer.Option(help="Threads; 0 takes one a core.")]


def calibrate(
    verifier: Verifier,
    drafter: Drafter,
    prompts: Prompts,
    per_file: PerFile = None,
    max_tokens: MaxTokens = 128,
    threads: Threads = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG; default reliability.png beside the drafter.")] = None,
) -> None:
    """Fit the drafter's confidences to observed acceptance, greedy and at temperature 1, and keep that beside it."""
    artifact = load_drafter_artifact(drafter)
    messages = [message for file in prompts for message in read_prompts(file, per_file)]
    plan = CollectPlan(verifier, drafter, max_tokens, threads=threads)
    records: list[RoundRecord] = []
    with progress_bar("greedy rounds") as progress:
        for offset, (name, temperature) in enumerate((("greedy rounds", 0.0), ("sampled rounds", 1.0))):
            found = collect_rounds(
                replace(plan, temperature=temperature),
                messages,
                lambda done, name=name, offset=offset: progress(name, (offset + done) / 2),  # type: ignore[misc]
            )
            # The same prompts again are other requests.
            records += [replace(record, request=record.request + offset * len(messages)) for record in found]
    report = fit_calibration(RoundTable.of(records), artifact.source_hash)
    report.calibration.save(drafter / CALIBRATION_FILE)
    picture = plot or drafter / "reliability.png"
    console = Console()
    console.print(calibration_table(report.positions))
    for note in report.calibration.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f"{drafter / CALIBRATION_FILE} written", highlight=False, soft_wrap=True)
    draw_reliability(picture, report.before, report.after)
    console.print(f"drawn in {picture}", highlight=False, soft_wrap=True)


def evaluate(
    verifier: Verifier,
    drafter: Drafter,
    prompts: Prompts,
    per_file: PerFile = None,
    max_tokens: MaxTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    threads: Threads = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("evaluation"),
) -> None:
    """Accepted length by prompt file, conditional acceptance by position, and a sweep over thresholds."""
    artifact = load_drafter_artifact(drafter)
    calibration = load_calibration(drafter, artifact.block_size, artifact.source_hash)
    plan = CollectPlan(verifier, drafter, max_tokens, temperature, threads)
    tables: dict[str, RoundTable] = {}
    every: list[RoundRecord] = []
    with progress_bar("run the prompts") as progress:
        for index, file in enumerate(prompts):
            messages = read_prompts(file, per_file)
            found = collect_rounds(
                plan,
                messages,
                lambda done, index=index, file=file: progress(file.stem, (index + done) / len(prompts)),  # type: ignore[misc]
            )
            # Files of the same name in different folders stay apart.
            name = file.stem if file.stem not in tables else str(file)
            tables[name] = RoundTable.of(found)
            every += found
    rates = {name: conditional_acceptance(rounds) for name, rounds in tables.items()}
    sweep = threshold_sweep(RoundTable.of(every), calibration)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(accepted_length_table(accepted_lengths(tables)))
    console.print(conditional_acceptance_table(rates))
    console.print(threshold_table(sweep))
    draw_conditional_acceptance(out / "conditional_acceptance.png", rates)
    draw_threshold_sweep(out / "threshold_sweep.png", sweep)
    console.print(f"pictures in {out}", highlight=False, soft_wrap=True)
