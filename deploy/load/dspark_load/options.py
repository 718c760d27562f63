"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dspark_load.cell import Load, default_policies
from dspark_load.limits import Limits

HERE = Path(__file__).resolve().parents[1]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; ``limits`` and ``loads`` are derived."""
    parser = argparse.ArgumentParser(
        prog="deploy/load/run",
        description="Drive a served model with perf_analyzer, closed and open loop, every policy in turns; write "
        "results.md, results.json and two pictures. Repeat the command to go on with a run that was cut.",
    )
    parser.add_argument("--url", help="host:port of gRPC of a running server; default: start one for the artifacts")
    parser.add_argument("--model", default="dspark")
    parser.add_argument("--verifier", type=Path, help="artifact folder; default: the quickstart's")
    parser.add_argument("--drafter", type=Path, help="artifact folder, with --verifier")
    parser.add_argument("--served", default="", metavar="TEXT", help="what is served, for the results page")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts", metavar="DIR", help="*.jsonl, a domain each")
    parser.add_argument("--text", action="store_true", help="send prompts as text_input, without a chat template")
    parser.add_argument("--out", type=Path, default=Path("load-results"), help="folder for segments and results")
    parser.add_argument("--policies", nargs="+", help="default: off fixed:1 fixed:GAMMA threshold:0.5 causal lagged")
    parser.add_argument("--gamma", type=int, help="default: the drafter's block size; 5 with --url")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="of the closed loop")
    parser.add_argument("--rates", type=float, nargs="*", default=[2.0, 4.0], help="requests/s of the open loop")
    parser.add_argument("--open-seconds", type=float, default=8.0, help="length of an open loop; default 8")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, in the mean")
    parser.add_argument("--parts", type=int, default=2, help="times that everything is measured")
    parser.add_argument("--open-parts", type=int, help="times that open loops are; default: as --parts")
    parser.add_argument("--minutes", type=float, help="begin no load that would end later")
    parser.add_argument("--ttft-limit", type=float, default=1000.0, metavar="MS", help="SLO; default 1000")
    parser.add_argument("--itl-limit", type=float, default=50.0, metavar="MS", help="SLO; default 50")
    parser.add_argument("--threads", type=int, default=0, help="of the started server's runtime; 0 is one a core")
    parser.add_argument("--profile-seconds", type=float, default=90.0, help="for its step times at the first start")
    parser.add_argument("--seed", type=int, default=0, help="of the order of prompts")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one run of the tool")
    parser.add_argument("--perf-analyzer", type=Path, help="binary; default: the one on PATH, else fetched")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/dspark"), help="where it is fetched to")
    given = parser.parse_args(arguments)
    if given.url and (given.verifier or given.drafter):
        parser.error("expected --url or --verifier and --drafter, got both")
    if not given.url and not (given.verifier and given.drafter):
        parser.error("expected --url HOST:PORT, or --verifier DIR and --drafter DIR")
    if any(streams < 1 for streams in given.streams) or any(rate <= 0 for rate in given.rates):
        parser.error("--streams, --rates: expected numbers above 0")
    if given.open_parts is None:
        given.open_parts = given.parts
    if given.tokens < 2 or min(given.parts, given.open_parts) < 1:
        parser.error("expected --tokens of at least 2, --parts and --open-parts of at least 1")
    given.cache = given.cache.expanduser().resolve()
    given.limits = Limits(given.ttft_limit / 1e3, given.itl_limit / 1e3)
    given.loads = [Load("closed", float(streams)) for streams in given.streams]
    given.loads += [Load("open", rate) for rate in given.rates]
    if not given.loads:
        parser.error("expected --streams or --rates, got neither")
    return given


def policies(given: argparse.Namespace, block_size: int) -> list[str]:
    """Those to compare."""
    return list(given.policies or default_policies(given.gamma or block_size))
