"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_load.comparison import MIN_PARTS, AgainstBest, Matched
from dspark_load.interval import Estimate
from dspark_load.limits import Limits
from dspark_load.row import Row

PAPER = "the paper, on its GPUs and with its models: +60% to +85% over MTP-1"


@dataclass(frozen=True)
class Labels:
    """What the reader must know of a run."""

    served: str
    machine: str
    command: str
    tool: str
    tokens: int
    domains: tuple[str, ...]
    segments: int
    noisy: int
    watched: bool
    """Whether the machine's other work was measured."""


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first ``left`` columns are aligned to the left."""
    rule = ["---" if column < left else "--:" for column in range(len(headings))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def cells(rows: Sequence[Row], limits: Limits) -> str:
    """One line a policy and load."""
    headings = ["load", "policy", "tokens/s in all", "tokens/s per user", "TTFT, ms", "TTFT p90, ms", "ITL, ms"]
    headings += ["accepted length", "verify budget", "requests/s", "within SLO", "goodput, requests/s"]
    headings += ["answers"]
    lines = [
        [
            str(row.cell.load),
            row.cell.policy,
            row.aggregate.text(0),
            row.per_user.text(1),
            row.ttft_ms.text(0),
            f"{row.ttft_p90_ms:.0f}",
            row.itl_ms.text(1),
            f"{row.accepted_length:.2f}",
            row.budget.text(2),
            f"{row.requests:.2f}",
            f"{row.met:.0%}",
            f"{row.goodput:.2f}",
            str(row.answers),
        ]
        for row in rows
    ]
    limit = f"SLO: TTFT at most {1e3 * limits.ttft:g} ms and ITL at most {1e3 * limits.itl:g} ms."
    spread = "In brackets: 95% bootstrap intervals, over parts and the answers of each."
    return f"{limit} {spread}\n\n{table(headings, lines, 2)}"


def best(found: Sequence[AgainstBest]) -> str:
    """The schedulers' aggregate speed over the best of the others, at every load."""
    headings = ["load", "policy", "best other", "ratio of tokens/s in all", "at least 0.97"]
    lines = [
        [str(one.load), one.policy, one.best, one.ratio.text(3), "yes" if one.ratio.value >= 0.97 else "**no**"]
        for one in found
    ]
    spread = (
        "Geometric means over parts, each of which asked both policies the same prompts. In brackets: 95%; from "
        f"{MIN_PARTS} parts on Student's interval of the parts' ratios, else resampled over parts and answers."
    )
    return f"{spread}\n\n{table(headings, lines, 3)}"


def gains(found: Sequence[Matched]) -> str:
    """How much faster a user is served at matched throughput."""
    headings = ["policy", "against", "tokens/s in all, matched", "faster per user", "at each level"]
    lines = []
    for one in found:
        if not one.ratios:
            lines.append([one.policy, one.base, "no throughput that both reach", "", ""])
            continue
        each = ", ".join(f"{100 * (ratio - 1):+.0f}%" for ratio in one.ratios)
        middle = _percent(one.gain) if one.gain else ""
        lines.append([one.policy, one.base, f"{one.levels[0]:.0f} to {one.levels[-1]:.0f}", middle, each])
    return table(headings, lines, 2)


def _percent(gain: Estimate) -> str:
    value, low, high = (f"{100 * (ratio - 1):+.0f}%" for ratio in (gain.value, gain.low, gain.high))
    return f"{value} [{low}, {high}]"


def page(
    labels: Labels, rows: Sequence[Row], limits: Limits, against: Sequence[AgainstBest], match: Sequence[Matched]
) -> str:
    """The whole results page."""
    noise = (
        f"In {labels.noisy} of {labels.segments} segments others used more than a tenth of a core."
        if labels.watched
        else "What else the server's machine did is not known."
    )
    shared = "client and server share its cores" if labels.watched else "it runs the client"
    closed = [row for row in rows if row.cell.load.mode == "closed"]
    opened = [row for row in rows if row.cell.load.mode == "open"]
    parts = [
        "# Load report",
        f"Served: {labels.served}. Machine: {labels.machine}; {shared}. perf_analyzer {labels.tool} over gRPC, greedy "
        f"answers of {labels.tokens} tokens in the mean, prompts of {', '.join(labels.domains)} in turn. {noise}",
        f"Repeat it: `{labels.command}`",
        f"## Throughput against the best other policy\n\n{best(against)}" if against else "",
        f"## Speed of a user at matched throughput\n\nMedian over levels, straight lines between the measured points "
        f"({PAPER}).\n\n{gains(match)}"
        if match
        else "",
        "![Throughput against speed of a user](pareto.png)\n\n![Throughput and verify budget by streams](budget.png)"
        if closed
        else "",
        f"## Closed loop: so many streams, always busy\n\n{cells(closed, limits)}" if closed else "",
        f"## Open loop: Poisson arrivals\n\n{cells(opened, limits)}" if opened else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
