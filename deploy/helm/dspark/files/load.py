"""Load test: perf_analyzer in a closed loop, policy by policy, at each concurrency. Standard library only.

Every request asks for the same number of tokens and ignores the end of the text, so that a response's tokens need not
be counted. Prints one JSON object a measurement, then a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def input_data(prompts: list[str], policy: str, max_tokens: int) -> dict[str, Any]:
    """perf_analyzer's ``--input-data``."""
    fixed = {"max_tokens": [max_tokens], "stream": [True], "ignore_eos": [True], "draft_policy": [policy]}
    return {"data": [{"text_input": [prompt], **fixed} for prompt in prompts]}


def summary(export: dict[str, Any], max_tokens: int) -> dict[str, float]:
    """Numbers of one ``--profile-export-file``: seconds, and tokens a second.

    Raises:
        ValueError: no request was answered.
    """
    requests = [r for e in export["experiments"] for r in e["requests"] if r["response_timestamps"]]
    if not requests:
        raise ValueError("expected answered requests in perf_analyzer's export, found none")
    first = [(r["response_timestamps"][0] - r["timestamp"]) / 1e9 for r in requests]
    total = [(r["response_timestamps"][-1] - r["timestamp"]) / 1e9 for r in requests]
    between = [(t - f) / max(1, max_tokens - 1) for f, t in zip(first, total, strict=True)]
    span = max(r["response_timestamps"][-1] for r in requests) - min(r["timestamp"] for r in requests)
    token_time = statistics.mean(between)
    return {
        "requests": len(requests),
        "ttft_p50": statistics.median(first),
        "ttft_p95": sorted(first)[max(0, -(-95 * len(first) // 100) - 1)],
        "itl_mean": token_time,
        "tokens_per_second_per_user": 1 / token_time if token_time > 0 else float("inf"),
        "tokens_per_second": len(requests) * max_tokens / (span / 1e9),
    }


def command(given: argparse.Namespace, concurrency: int, data: Path, export: Path) -> list[str]:
    """The call of perf_analyzer."""
    return [
        "perf_analyzer", "-m", given.model, "-u", given.url, "-i", "grpc", "--streaming", "--async",
        "--input-data", str(data), "--concurrency-range", str(concurrency),
        "--request-count", str(concurrency * given.requests_per_stream), "--profile-export-file", str(export),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="dspark")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--concurrency", required=True)
    parser.add_argument("--policies", required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--requests-per-stream", type=int, default=8)
    given = parser.parse_args(arguments)
    prompts = json.loads(given.prompts.read_text(encoding="utf-8"))
    rows = []
    # Policies alternate at each concurrency, so that a slow minute of the machine does not meet one of them alone.
    for concurrency in map(int, given.concurrency.split(",")):
        for policy in given.policies.split(","):
            label = f"{policy.replace(':', '-')}-{concurrency}"
            data, export = Path(f"{label}.input.json"), Path(f"{label}.export.json")
            data.write_text(json.dumps(input_data(prompts, policy, given.max_tokens)), encoding="utf-8")
            export.unlink(missing_ok=True)
            subprocess.run(command(given, concurrency, data, export), stdout=sys.stderr, check=True)
            # The tensors of the responses stand in it as they are, which is not always text.
            written = export.read_text(encoding="utf-8", errors="replace")
            numbers = summary(json.loads(written, strict=False), given.max_tokens)
            rows.append({"policy": policy, "concurrency": concurrency, **numbers})
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    sys.stdout.write("\nstreams  policy         tokens/s  per user  first token p50, ms\n")
    for row in rows:
        sys.stdout.write(
            f"{row['concurrency']:7d}  {row['policy']:13s} {row['tokens_per_second']:9.1f} "
            f"{row['tokens_per_second_per_user']:9.1f} {row['ttft_p50'] * 1e3:20.0f}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
