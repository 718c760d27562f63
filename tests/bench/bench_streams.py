"""Speed through a running server at several numbers of streams, measured by the client: a table, and a picture.

    python tests/bench/bench_streams.py --url localhost:8001 --png streams.png

Every stream asks for the same number of tokens (``ignore_eos``), greedily; the numbers of streams take turns, so that a
noisy machine is noisy for all of them. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dspark_client import DSparkClient, GenerateOptions

PROMPTS = (
    "Explain how rain forms.",
    "Write a short story about a lighthouse.",
    "What is the difference between a list and a tuple in Python?",
    "A train travels 60 km in 45 minutes. How fast is it?",
    "Suggest three names for a bakery.",
    "Translate 'good morning' into French and Spanish.",
    "How do vaccines work?",
    "Write a function that reverses a string.",
)


@dataclass(frozen=True)
class Measured:
    """One round at one number of streams."""

    per_user: float
    """Tokens a second after the first, mean over streams."""
    aggregate: float
    """Tokens of all streams over the time until the last ended."""
    first_token: float
    """Milliseconds until the first token, median over streams."""


def one_round(url: str, streams: int, tokens: int) -> Measured:
    """Run ``streams`` requests at once."""
    speeds, firsts = [0.0] * streams, [0.0] * streams
    start = threading.Barrier(streams + 1)

    def client(index: int) -> None:
        options = GenerateOptions(max_tokens=tokens, ignore_eos=True)
        messages = [{"role": "user", "content": PROMPTS[index % len(PROMPTS)]}]
        with DSparkClient(url) as connection:
            start.wait()
            begin = time.perf_counter()
            times = [
                time.perf_counter()
                for piece in connection.stream(messages=messages, options=options)
                if piece.token_ids
            ]
        firsts[index] = 1e3 * (times[0] - begin)
        speeds[index] = (tokens - 1) / (times[-1] - times[0])

    threads = [threading.Thread(target=client, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begin
    return Measured(statistics.mean(speeds), streams * tokens / elapsed, statistics.median(firsts))


def draw(png: Path, rows: dict[int, Measured]) -> None:
    """Tokens a second of a user and of all users, by streams."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    for place, (title, value) in enumerate((("per user", "per_user"), ("all users", "aggregate")), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(list(rows), [getattr(row, value) for row in rows.values()], marker="o")
        axes.set(title=title, xlabel="streams", ylabel="tokens/s", ylim=(0, None), xticks=list(rows))
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(png)


def median(rounds: list[Measured], of: Callable[[Measured], float]) -> float:
    return statistics.median(of(one) for one in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    found: dict[int, list[Measured]] = {streams: [] for streams in options.streams}
    one_round(options.url, 1, 16)
    for _ in range(options.rounds):
        for streams in options.streams:
            found[streams].append(one_round(options.url, streams, options.tokens))
    rows = {
        streams: Measured(
            median(rounds, lambda one: one.per_user),
            median(rounds, lambda one: one.aggregate),
            median(rounds, lambda one: one.first_token),
        )
        for streams, rounds in found.items()
    }
    table = Table(title=f"{options.tokens} tokens a stream, median of {options.rounds} rounds")
    for heading in ("streams", "tokens/s per user", "tokens/s in all", "first token, ms"):
        table.add_column(heading, justify="right")
    for streams, row in rows.items():
        table.add_row(str(streams), f"{row.per_user:.1f}", f"{row.aggregate:.1f}", f"{row.first_token:.0f}")
    Console().print(table)
    if options.png:
        draw(options.png, rows)


if __name__ == "__main__":
    main()
