"""``dspark-export corpus``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dspark_export.commands.progress import console
from dspark_export.commands.signals import stop_on_signals
from dspark_export.errors import ExportError


def corpus(
    verifier: Annotated[Path, typer.Option(help="Artifact directory of the verifier.")],
    out: Annotated[Path, typer.Option(help="Folder of the corpus; train reads it with --corpus.")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Prompt file (JSON lines or text); may be repeated.")
    ] = None,
    openings: Annotated[
        list[Path] | None, typer.Option(help="Beginnings of user turns, one a line; may be repeated.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="How many there shall be; default as many as it is left.")] = None,
    feature_cache: Annotated[bool, typer.Option(help="Keep what the target said along the text.")] = True,
    seed: Annotated[int, typer.Option(help="Of prompts and answers.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 takes one a core.")] = 0,
    shard_size: Annotated[int, typer.Option(help="Dialogues of a shard.")] = 256,
    held_out: Annotated[int, typer.Option(help="Dialogues that only measure.")] = 48,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 192,
    prompt_tokens: Annotated[int, typer.Option(help="Most tokens of a prompt.")] = 160,
    prompt_temperature: Annotated[float, typer.Option(help="At which the target writes prompts.")] = 1.0,
    sampled_share: Annotated[float, typer.Option(help="Part of the answers drawn at temperature 1.")] = 0.5,
    answers_per_prompt: Annotated[int, typer.Option(help="At most one of them greedy.")] = 2,
    slots: Annotated[int, typer.Option(help="Answers generated at once.")] = 64,
) -> None:
    """Write text for training ahead of it: run it beside ``train --corpus``, or before."""
    given: dict[str, Any] = dict(locals())
    try:
        from dspark_export.training.corpus_run import CorpusRun
        from dspark_export.training.corpus_settings import CorpusSettings
        from dspark_export.training.generate import Stopped
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ExportError(
            "a corpus is written with torch; install it: pip install 'dspark-triton[export,backend,train]'"
        ) from None
    with stop_on_signals() as stop:
        run = CorpusRun(out, CorpusSettings.from_options(given), stop.is_set)
        try:
            for report in run.shards(shards):
                console.print(str(report), highlight=False, soft_wrap=True)
        except Stopped:
            console.print(f"stopped; whole shards are kept in {out}", highlight=False, soft_wrap=True)
        finally:
            run.close()
