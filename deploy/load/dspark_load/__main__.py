"""``python -m dspark_load``: measure what the journal lacks, then write the report of what it holds."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from dspark_load import figure, machine, options, prompts, report
from dspark_load.cell import Cell, Load, order
from dspark_load.comparison import against_best, matched
from dspark_load.errors import LoadError
from dspark_load.journal import Journal
from dspark_load.machine import Foreign
from dspark_load.prompts import Prompt
from dspark_load.row import NOISE, rows
from dspark_load.segment import Segment, reduce
from dspark_load.tool import PerfAnalyzer, Target, find

log = logging.getLogger("dspark_load")

BLOCK_SIZE = 5
"""Assumed of a server that runs already."""
WARM_TOKENS = 16
SETTLE_SECS = 0.3


class Campaign:
    """One call: what to measure, and where the segments go."""

    def __init__(self, given: argparse.Namespace, asked: list[Prompt], wanted: list[str], journal: Journal) -> None:
        self.given = given
        self.asked = asked
        self.policies = wanted
        self.journal = journal

    def missing(self) -> bool:
        return any(
            not self.journal.has(Cell(policy, load), part) for part, load in self.places() for policy in self.policies
        )

    def places(self) -> list[tuple[int, Load]]:
        """What is measured, in order: all loads of a part, then the next part."""
        given = self.given
        parts = {"closed": given.parts, "open": given.open_parts}
        return [(part, load) for part in range(max(parts.values())) for load in given.loads if part < parts[load.mode]]

    def run(self, tool: PerfAnalyzer, target: Target) -> None:
        """Every policy of a load in turns, then the next load; stops where the next load would not fit the time."""
        scratch = self.given.out / "perf_analyzer"
        warm = [(self.asked[0], policy) for policy in self.policies]
        tool.measure(target, Load("closed", 1.0), warm, WARM_TOKENS, scratch, self.given.timeout)
        begin, longest = time.monotonic(), 0.0
        for part, load in self.places():
            left = [Cell(policy, load) for policy in order(self.policies, part)]
            left = [cell for cell in left if not self.journal.has(cell, part)]
            started = time.monotonic()
            if self.given.minutes and left and started - begin + longest > 60 * self.given.minutes:
                log.info("%g minutes are over: repeat the command to go on", self.given.minutes)
                return
            for cell in left:
                self.journal.add(self.measure(tool, target, cell, part, scratch))
            longest = max(longest, time.monotonic() - started)

    def measure(self, tool: PerfAnalyzer, target: Target, cell: Cell, part: int, scratch: Path) -> Segment:
        """One segment. All policies of a load and part get the same prompts in the same order."""
        time.sleep(SETTLE_SECS)
        count = cell.load.requests(self.given.open_seconds)
        mine = [(prompt, cell.policy) for prompt in prompts.stretch(self.asked, part * count, count)]
        foreign = Foreign()
        profile = tool.measure(target, cell.load, mine, self.given.tokens, scratch, self.given.timeout)
        segment = reduce(cell, part, profile, round(foreign.cores(), 3) if not self.given.url else 0.0)
        log.info(
            "part %d/%d  %s  %s: %.0f tokens/s in all%s",
            part + 1,
            max(self.given.parts, self.given.open_parts),
            cell.load,
            cell.policy,
            segment.aggregate,
            f", others used {segment.foreign_cores:.1f} cores" if segment.foreign_cores > NOISE else "",
        )
        return segment

    def present(self, tool: str) -> None:
        """Write the page, the JSON and the pictures.

        Raises:
            LoadError: nothing was measured.
        """
        given = self.given
        known = [Cell(policy, load) for load in given.loads for policy in self.policies]
        segments = sorted(
            (segment for segment in self.journal.segments if segment.cell in known),
            key=lambda segment: known.index(segment.cell),
        )
        if not segments:
            raise LoadError("nothing was measured: allow more --minutes")
        lines, against = rows(segments, given.limits), against_best(segments)
        match = matched(segments)
        labels = report.Labels(
            served=given.served or ("the model at --url" if given.url else given.verifier.name),
            machine=machine.describe(),
            command=shlex.join(["deploy/load/run", *_shown(sys.argv[1:])]),
            tool=tool,
            tokens=given.tokens,
            domains=tuple(sorted({prompt.domain for prompt in self.asked})),
            segments=len(segments),
            noisy=sum(row.noisy for row in lines),
            watched=not given.url,
        )
        text = report.page(labels, lines, given.limits, against, match)
        (given.out / "results.md").write_text(text, encoding="utf-8")
        results = {
            "labels": asdict(labels),
            "limits": asdict(given.limits),
            "rows": [asdict(row) for row in lines],
            "against_best": [asdict(one) for one in against],
            "matched": [asdict(one) for one in match],
        }
        (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if given.streams and importlib.util.find_spec("matplotlib") is None:
            log.warning("no pictures: they need matplotlib")
        elif given.streams:
            figure.pareto(given.out / "pareto.png", lines)
            figure.budget(given.out / "budget.png", lines)
        sys.stdout.write(text)


def _shown(arguments: list[str]) -> list[str]:
    """The options that a reader would repeat: not those that name folders of this machine."""
    hidden = {"--cache", "--verifier", "--drafter", "--out", "--perf-analyzer", "--served"}
    shown, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in hidden:
            shown.append(argument)
        skip = argument in hidden
    return shown


def run(given: argparse.Namespace) -> None:
    """Raises:
    LoadError: the artifacts, prompts, tool or server are not as expected.
    """
    given.out.mkdir(parents=True, exist_ok=True)
    asked = prompts.read(given.prompts, given.seed)
    text = "\0".join(prompt.text for prompt in asked)
    pair = None
    if not given.url:
        from dspark_load.serving import Pair  # a client alone has no server to import

        pair = Pair(given.verifier, given.drafter)
        pair.check()
    settings = {
        "tokens": given.tokens,
        "lengths": list(prompts.LENGTHS),
        "prompts": hashlib.sha256(text.encode()).hexdigest()[:12],
        "chat": not given.text,
        "threads": given.threads,
        "open_seconds": given.open_seconds,
        "served": pair.key if pair else f"{given.url}/{given.model}",
    }
    wanted = options.policies(given, pair.block_size if pair else BLOCK_SIZE)
    campaign = Campaign(given, asked, wanted, Journal(given.out / "segments.jsonl", settings))
    tool = find(given.perf_analyzer, given.cache)
    if campaign.missing():
        with ExitStack() as stack:
            url = given.url
            if pair is not None:
                from dspark_load.serving import serve

                log.info("starting the server")
                most = max([*given.streams, 16])
                server = serve(pair, given.out / "server", most, given.threads, given.profile_seconds)
                url = stack.enter_context(server).grpc_url
            campaign.run(tool, Target(url, given.model, not given.text))
    campaign.present(tool.version)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="  %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with us
    try:
        run(options.parse())
    except LoadError as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted: repeat the command to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
