"""What the commands write: text as it comes, JSON lines, tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from dspark_client.completion import Completion, Piece, Usage
from dspark_client.prometheus import Sample
from dspark_client.server_info import ModelInfo, ModelStatistics

_PIPE_WIDTH = 200
_BUCKET = "_bucket"


def write(text: str) -> None:
    """Text to stdout as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One dataclass or JSON value on a line of its own."""
    write(json.dumps(value, default=asdict, ensure_ascii=False) + "\n")


def write_error(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"dspark: {' '.join(message.split())}\n")


def write_text_pieces(pieces: Iterable[Piece]) -> tuple[str, Usage | None]:
    """Writes pieces of one sequence as they come; returns the whole text and the usage."""
    texts, usage = [], None
    try:
        for piece in pieces:
            write(piece.text)
            texts.append(piece.text)
            usage = piece.usage or usage
    finally:
        if texts:
            write("\n")
    return "".join(texts), usage


def write_json_pieces(pieces: Iterable[Piece]) -> tuple[str, Usage | None]:
    """Writes pieces of one sequence as they come, a line each; returns the whole text and the usage."""
    texts, usage = [], None
    for piece in pieces:
        write_json(piece)
        texts.append(piece.text)
        usage = piece.usage or usage
    return "".join(texts), usage


def write_completions(completions: Sequence[Completion]) -> None:
    """Writes whole answers, under a line each that numbers them if there are several."""
    for completion in completions:
        if len(completions) > 1:
            write(f"--- {completion.sequence_index + 1} of {len(completions)}\n")
        write(completion.text + "\n")


def write_usage(usage: Usage) -> None:
    """One line on stderr: tokens, speed and how well drafting worked."""
    drafting = ""
    if usage.draft_tokens:
        # The first token comes from the prompt, not from a round.
        per_round = (usage.output_tokens - 1) / usage.rounds if usage.rounds else 0.0
        drafting = f"; {per_round:.2f} tokens a round, {usage.acceptance_rate:.0%} of verified drafts accepted"
    sys.stderr.write(
        f"{usage.input_tokens} tokens in, {usage.output_tokens} out; first after "
        f"{usage.time_to_first_token_s * 1000:.0f} ms, then {usage.tokens_per_second:.1f} tokens/s{drafting}\n"
    )


def write_models(models: Sequence[ModelInfo]) -> None:
    table = Table("model", "version", "state", "reason")
    for model in models:
        table.add_row(model.name, model.version, model.state, model.reason)
    _console().print(table)


def write_statistics(statistics: Sequence[ModelStatistics]) -> None:
    table = Table("model", "version", "inferences", "executions", "succeeded", "failed", "mean queue ms")
    for model in statistics:
        queue_ms = model.queue.total_ns / model.queue.count / 1e6 if model.queue.count else 0.0
        counts = (model.inferences, model.executions, model.success.count, model.fail.count)
        table.add_row(model.name, model.version, *map(str, counts), f"{queue_ms:.3f}")
    _console().print(table)


def write_metrics(samples: Sequence[Sample]) -> None:
    """A table of the samples; of a histogram only its sum and count."""
    table = Table("metric", "labels", "value")
    for sample in samples:
        if not sample.name.endswith(_BUCKET):
            labels = ", ".join(f"{name}={value}" for name, value in sample.labels)
            table.add_row(sample.name, labels, f"{sample.value:g}")
    _console().print(table)


def _console() -> Console:
    # Not a terminal: do not cut cells to the 80 columns rich assumes.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
