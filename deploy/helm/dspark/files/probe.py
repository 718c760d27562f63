"""Readiness and liveness: can the model infer, or is it at least at work?

A request for one token is made. Behind a long queue it may get no answer in time; such a server must neither be
restarted nor taken out of service, so the engine's counters decide: they stand still when the engine or its stub is
dead.
"""

from __future__ import annotations

import argparse
import re
import sys
import urllib.request

from dspark_backend.serving import health

WORK = ("dspark_steps_total", "dspark_prompt_tokens_total", "dspark_generation_tokens_total")
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


def work_done(metrics_url: str, timeout: float = 2.0) -> float | None:
    """Steps and tokens so far, or None where nobody tells."""
    try:
        with urllib.request.urlopen(metrics_url, timeout=timeout) as answer:
            samples = _SAMPLE.findall(answer.read().decode(errors="replace"))
    except OSError:
        return None
    values = [float(value) for name, value in samples if name in WORK]
    return sum(values) if values else None


def verdict(state: health.Health, before: float | None, after: float | None) -> tuple[bool, str]:
    """Whether the server is well, and why."""
    if state.alive:
        return True, state.reason
    if before is not None and after is not None and after > before and "no answer within" in state.reason:
        return True, f"busy: {state.reason}, but {after - before:.0f} steps and tokens were made meanwhile"
    return False, state.reason


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--metrics-url", required=True)
    parser.add_argument("--model", default=health.DEFAULT_MODEL)
    parser.add_argument("--timeout", type=float, required=True)
    given = parser.parse_args(arguments)
    before = work_done(given.metrics_url)
    state = health.check(given.url, given.model, given.timeout)
    good, reason = verdict(state, before, None if state.alive else work_done(given.metrics_url))
    sys.stdout.write(f"{'well' if good else 'unwell'}: {reason}\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
