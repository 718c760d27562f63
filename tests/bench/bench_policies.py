"""Speculation's policies against each other and against none, through a real Triton and the asyncio client.

    python tests/bench/bench_policies.py --prompts DIR --out DIR \\
        --precision float32=VERIFIER_DIR,DRAFTER_DIR --precision int8=VERIFIER_DIR,DRAFTER_DIR

One server a precision; the policy is a parameter of each request. The prompts are cut into parts, and each part is
answered by every cell (precision, policy, streams) in turn before the next part begins, in an order that rotates:
neighbours in the table were measured within minutes on the same prompts. Every segment is written down at once: a run
that was cut goes on where it stopped when the command is repeated. The table holds the parts that all cells have.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from speed import load, markdown, policy_figure, policy_rows
from speed.journal import Cell, Journal, Segment
from speed.prompts import BenchPrompt, choose, fingerprint, split
from speed.quietness import NOISE, Foreign, settle
from speed.serving import Precision, serve

POLICIES = ("off", "fixed:1", "fixed:5", "causal", "lagged")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="folder with gsm8k, mbpp and mt-bench .jsonl")
    parser.add_argument("--precision", type=Precision.parse, action="append", required=True, metavar="NAME=V,D")
    parser.add_argument("--out", type=Path, required=True, help="folder for segments, table, JSON and picture")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompts-per-domain", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="parts that the prompts are cut into")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="of each server's runtime; 0 is one a core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", type=float, default=0.5, help="share of the prompts that a single stream answers")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, a segment")
    parser.add_argument("--minutes", type=float, help="begin no part that would end later; repeat the command to go on")
    given = parser.parse_args()
    if given.repeats > 3 * given.prompts_per_domain:
        parser.error(f"--repeats: expected at most {3 * given.prompts_per_domain}, as many as prompts")
    return given


def order(cells: Sequence[Cell], part: int, streams: int) -> list[Cell]:
    """The cells of one number of streams, rotated by the part, and backwards in every other part."""
    mine = [cell for cell in cells if cell.streams == streams]
    shift = part * 3 % len(mine)
    rotated = mine[shift:] + mine[:shift]
    return rotated[::-1] if part % 2 else rotated


def measure(given: argparse.Namespace, url: str, cell: Cell, part: int, prompts: Sequence[BenchPrompt]) -> Segment:
    """One cell on one part of the prompts; on the first of them only where a single stream answers them."""
    mine = split(prompts, given.repeats, part, cell.streams)
    if cell.streams == 1:
        mine = mine[: max(1, round(given.alone * len(mine)))]
    names = {prompt.name for prompt in mine}
    fillers = [prompt for prompt in prompts if prompt.name not in names] or mine
    settle(given.patience)
    foreign = Foreign()
    done = load.run(url, cell.policy, cell.streams, mine, fillers, given.tokens)
    return Segment(cell, part, done.answers, done.tokens, done.seconds, round(foreign.cores(), 3))


def run(given: argparse.Namespace, prompts: Sequence[BenchPrompt], cells: Sequence[Cell], journal: Journal) -> None:
    """Measure what the journal lacks."""
    missing = [p for p in range(given.repeats) if not all(journal.has(cell, p) for cell in cells)]
    if not missing:
        return
    with ExitStack() as stack:
        servers = {}
        for precision in given.precision:
            print(f"starting {precision.name}", flush=True)
            folder = given.out / "servers" / precision.name
            servers[precision.name] = stack.enter_context(
                serve(precision, folder, given.out / "cost", max(given.streams), given.threads)
            )
        for server in servers.values():
            for policy in given.policies:
                load.run(server.grpc_url, policy, 1, prompts[:1], prompts[:1], 16, keep_up=False)
        begin = time.monotonic()
        longest = 0.0
        for part in missing:
            started = time.monotonic()
            if given.minutes is not None and started - begin + longest > 60 * given.minutes:
                print(f"{given.minutes:g} minutes are over: repeat the command to go on", flush=True)
                return
            for streams in given.streams:
                for cell in order(cells, part, streams):
                    if journal.has(cell, part):
                        continue
                    segment = measure(given, servers[cell.precision].grpc_url, cell, part, prompts)
                    journal.add(segment)
                    report(segment, given.repeats)
            longest = max(longest, time.monotonic() - started)


def report(segment: Segment, repeats: int) -> None:
    cell = segment.cell
    noise = f", others used {segment.foreign_cores:.1f} cores" if segment.foreign_cores > NOISE else ""
    print(
        f"part {segment.part + 1}/{repeats} {cell.precision} {cell.policy} {cell.streams} streams: "
        f"{segment.tokens / segment.seconds:.0f} tokens/s in all, {segment.seconds:.1f} s{noise}",
        flush=True,
    )


def policy_table(rows: Sequence[policy_rows.Row]) -> str:
    headings = ["precision", "policy", "streams", "tokens/s per user", "tokens/s in all", "over off", "over fixed:1"]
    headings += ["accepted length", "verify budget", "first token, ms", "answers"]
    lines = [
        [
            row.cell.precision,
            row.cell.policy,
            str(row.cell.streams),
            markdown.number(row.per_user, 1),
            markdown.number(row.aggregate, 0),
            markdown.number(row.to_off, 2),
            markdown.number(row.to_fixed1, 2),
            markdown.number(row.accepted_length, 2),
            markdown.number(row.budget, 2),
            markdown.number(row.first_token_ms, 0),
            str(row.answers),
        ]
        for row in rows
    ]
    return markdown.table(headings, lines)


def domain_table(rows: Sequence[policy_rows.DomainRow]) -> str:
    headings = ["precision", "policy", "domain", "tokens/s per user", "over off", "accepted length", "verify budget"]
    lines = [
        [
            row.cell.precision,
            row.cell.policy,
            row.domain,
            markdown.number(row.per_user, 1),
            markdown.number(row.to_off, 2),
            markdown.number(row.accepted_length, 2),
            markdown.number(row.budget, 2),
        ]
        for row in rows
    ]
    return markdown.table(headings, lines, left=3)


def present(given: argparse.Namespace, cells: Sequence[Cell], journal: Journal) -> None:
    """Print the tables, and write them, the JSON and the picture."""
    parts = journal.complete_parts(cells)
    if not parts:
        raise SystemExit("no part is complete yet: repeat the command to go on")
    segments = [segment for segment in journal.segments if segment.part in parts]
    ordered = sorted(cells, key=lambda cell: (given.streams.index(cell.streams), cells.index(cell)))
    rows = policy_rows.rows(ordered, segments)
    least = min(given.streams)
    domains = policy_rows.domain_rows(cells, segments, least)
    unequal, all_prompts = policy_rows.unequal_prompts(segments)
    noisy = sum(row.noisy for row in rows)
    text = "\n".join(
        [
            f"{given.tokens} new tokens, greedy, {3 * given.prompts_per_domain} prompts in {given.repeats} parts, "
            f"{len(parts)} of them answered by every cell; {os.cpu_count()} cores.",
            "",
            policy_table(rows),
            "",
            f"By domain, {least} stream{'s' if least > 1 else ''}:",
            "",
            domain_table(domains),
            "",
            f"Answers: {all_prompts - unequal} of {all_prompts} (prompt, precision) pairs have one and the same answer "
            "in every cell.",
            f"Noise: in {noisy} of {len(segments)} segments others used more than {NOISE} of a core.",
        ]
    )
    print(f"\n{text}")
    (given.out / "policies.md").write_text(f"{text}\n", encoding="utf-8")
    content = {
        "tokens": given.tokens,
        "parts": len(parts),
        "unequal_prompts": unequal,
        "noisy_segments": noisy,
        "rows": [asdict(row) for row in rows],
        "domains": [asdict(row) for row in domains],
    }
    (given.out / "policies.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    policy_figure.draw(given.out / "policies.png", rows)


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and engines end with us
    prompts = choose(given.prompts, given.prompts_per_domain, given.seed)
    cells = [
        Cell(precision.name, policy, streams)
        for streams in given.streams
        for precision in given.precision
        for policy in given.policies
    ]
    settings = {
        "tokens": given.tokens,
        "repeats": given.repeats,
        "alone": given.alone,
        "beginnings": "spread",
        "prompts": fingerprint(prompts),
        "threads": given.threads,
        "artifacts": {precision.name: precision.key for precision in given.precision},
    }
    journal = Journal(given.out / "segments.jsonl", settings)
    run(given, prompts, cells, journal)
    present(given, cells, journal)


if __name__ == "__main__":
    main()
