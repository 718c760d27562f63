"""``dspark-export train``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from dspark_export.commands.layer_ids import layer_ids
from dspark_export.commands.progress import console
from dspark_export.commands.signals import stop_on_signals
from dspark_export.errors import ExportError

if TYPE_CHECKING:
    from dspark_export.training.status import RunReport, Status

_LINE_SECONDS = 60.0


def train(
    verifier: Annotated[Path, typer.Option(help="Artifact directory of the verifier.")],
    model: Annotated[str, typer.Option(help="What it was exported from, as for dspark-export verifier.")],
    out: Annotated[Path, typer.Option(help="Folder of the run, and of the drafter in the released layout.")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Prompt file (JSON lines or text); may be repeated.")
    ] = None,
    openings: Annotated[
        list[Path] | None, typer.Option(help="Beginnings of user turns, one a line; may be repeated.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Folder of the text, which dspark-export corpus may write; default in --out.")
    ] = None,
    feature_cache: Annotated[bool, typer.Option(help="Keep what the target said along the text.")] = True,
    hours: Annotated[float | None, typer.Option(help="Time to spend, text generation included; default 1.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Instead of hours: tokens of answers to train on.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens drafted a round.")] = 5,
    layers: Annotated[int, typer.Option(help="Layers of the drafter.")] = 2,
    rank: Annotated[int, typer.Option(help="Rank of the Markov head.")] = 64,
    head: Annotated[str, typer.Option(help="Sequential head: vanilla, gated or rnn.")] = "vanilla",
    draft_vocab: Annotated[
        int | None, typer.Option(help="Propose only the target's N most frequent tokens; default all.")
    ] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Of the drafter's MLPs; default the target's.")] = None,
    target_layer_ids: Annotated[
        str | None,
        typer.Option(help="Of the verifier's layers, those that the drafter reads, such as 1,8; default all."),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Drafter in the released layout to train further, with the same architecture.")
    ] = None,
    init_markov: Annotated[str, typer.Option(help="Markov head at the start: bigram or random.")] = "bigram",
    init_layers: Annotated[str, typer.Option(help="Layers at the start: random, or target for copies of its last.")] = (
        "target"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Of text, order, anchors and weights.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 takes one a core.")] = 0,
    optimiser: Annotated[str, typer.Option(help="adamw, or muon for the matrices.")] = "adamw",
    muon_rate: Annotated[float, typer.Option(help="Muon's learning rate as a multiple of AdamW's.")] = 1.0,
    muon_iterations: Annotated[int, typer.Option(help="Newton-Schulz steps of Muon.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 3e-3,
    schedule: Annotated[str, typer.Option(help="cosine, or wsd, whose budget may be made longer with --resume.")] = (
        "cosine"
    ),
    decay_share: Annotated[float, typer.Option(help="Last part of the budget, in which the rate of wsd falls.")] = 0.2,
    warmup_steps: Annotated[int, typer.Option(help="Steps up to it.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.01,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights, which are the ones written.")] = 0.999,
    dialogues_per_step: Annotated[int, typer.Option(help="Dialogues of a step.")] = 16,
    anchors: Annotated[int, typer.Option(help="Most blocks of each.")] = 32,
    passes: Annotated[int, typer.Option(help="How often a dialogue is trained on.")] = 3,
    shard_size: Annotated[int, typer.Option(help="Dialogues generated at a time.")] = 256,
    first_shards: Annotated[int, typer.Option(help="Shards generated before the first step.")] = 2,
    held_out: Annotated[int, typer.Option(help="Dialogues that only measure.")] = 48,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 192,
    prompt_tokens: Annotated[int, typer.Option(help="Most tokens of a prompt.")] = 160,
    prompt_temperature: Annotated[float, typer.Option(help="At which the target writes prompts.")] = 1.0,
    sampled_share: Annotated[float, typer.Option(help="Part of the answers drawn at temperature 1.")] = 0.5,
    answers_per_prompt: Annotated[int, typer.Option(help="At most one of them greedy.")] = 2,
    slots: Annotated[int, typer.Option(help="Answers generated at once.")] = 64,
    ce_weight: Annotated[float, typer.Option(help="Of the cross entropy in the loss.")] = 0.1,
    l1_weight: Annotated[float, typer.Option(help="Of the distance to the target's distribution.")] = 0.9,
    confidence_weight: Annotated[float, typer.Option(help="Of the confidence head.")] = 1.0,
    distribution_weight: Annotated[float, typer.Option(help="Of the cross entropy to its whole distribution.")] = 1.0,
    position_decay: Annotated[float, typer.Option(help="Slot k weighs exp(-k / this).")] = 4.0,
    dtype: Annotated[str, typer.Option(help="Storage of the drafter: float32, float16 or bfloat16.")] = "bfloat16",
    precision: Annotated[str, typer.Option(help="While training: float32, bfloat16, or auto for the faster.")] = "auto",
    checkpoint_minutes: Annotated[float, typer.Option(help="Between two checkpoints.")] = 5.0,
    evaluate_minutes: Annotated[float, typer.Option(help="Between two held-out measurements.")] = 5.0,
) -> None:
    """Train a drafter for an exported verifier on text that the target writes itself."""
    given: dict[str, Any] = dict(locals())
    try:
        from dspark_export.training.corpus_settings import CorpusSettings
        from dspark_export.training.generate import Stopped
        from dspark_export.training.run import TrainingRun
        from dspark_export.training.settings import TrainSettings
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ExportError(
            "training needs torch; install it: pip install 'dspark-triton[export,backend,train]'"
        ) from None
    own = {field.name for field in fields(TrainSettings)} - {"text", "target_layer_ids", "clip"}
    settings = TrainSettings(
        text=CorpusSettings.from_options(given),
        target_layer_ids=layer_ids(target_layer_ids),
        **{name: given[name] for name in own},
    )
    with stop_on_signals() as stop, _display() as show:
        try:
            report = TrainingRun(settings, stop.is_set, show).run(resume)
        except Stopped:
            report = None
        except FloatingPointError as error:
            raise ExportError(str(error)) from error
    _say(report, settings.out, verifier)


def _say(report: RunReport | None, out: Path, verifier: Path) -> None:
    if report is None:
        text = f"stopped while the first text was generated; what is there is kept in {out}: go on with --resume"
    else:
        position = report.position
        text = (
            f"{position.step} steps, {position.seen_tokens} tokens, {timedelta(seconds=round(position.seconds))}: "
            f"held-out accepted length {report.held_out.accepted_length:.3f} (greedy)"
        )
        domains = report.held_out.by_domain
        text += f": {', '.join(f'{name} {length:.3f}' for name, length in domains)}\n" if len(domains) > 1 else "\n"
        text += (
            f"dspark-export drafter --checkpoint {out} --verifier {verifier} --out DIR exports it"
            if report.finished
            else f"stopped before the end; go on with --resume. The drafter so far is in {out}"
        )
    console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def _display() -> Iterator[Any]:
    """A bar on stderr with what is being done, the loss, the held-out accepted length and the time that is left."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        TextColumn("{task.fields[numbers]}"),
    )
    if not console.is_terminal:
        yield _Lines()
        return
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("start", total=1.0, left="-", numbers="")

        def show(status: Status) -> None:
            bar.update(
                task, description=status.what, completed=status.done, left=_left(status), numbers=_numbers(status)
            )  # fmt: skip

        yield show


class _Lines:
    """Without a terminal: a line a minute, for a log file."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, status: Status) -> None:
        seconds = status.position.seconds
        if seconds >= self._next:
            self._next = seconds + _LINE_SECONDS
            spent = timedelta(seconds=round(seconds))
            parts = f"{spent} {100 * status.done:.1f}% {status.what}: {_numbers(status)}, left {_left(status)}"
            console.print(parts, highlight=False, soft_wrap=True)


def _left(status: Status) -> str:
    seconds = status.remaining_seconds
    return "-" if math.isnan(seconds) else str(timedelta(seconds=round(seconds)))


def _numbers(status: Status) -> str:
    parts = [f"step {status.position.step}"]
    if status.last is not None:
        parts.append(f"loss {status.last.loss:.3f}")
    if status.held_out is not None:
        parts.append(f"accepted {status.held_out.accepted_length:.2f}")
    return ", ".join(parts)
