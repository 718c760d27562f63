"""Time of choosing depths for a whole batch, by policy and number of requests; the aim is 1 ms for 1,000 requests.

Run: python tests/bench/bench_scheduling.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from dspark_backend.scheduling import DepthPolicy, DraftRound, parse_policy

POLICIES = ("off", "fixed:3", "threshold:0.3", "causal", "lagged")
REQUESTS = (1, 16, 128, 1000)
BLOCK = 7
SHAPES = ("all different", "many ties")


def make_round(count: int, shape: str, generator: np.random.Generator) -> DraftRound:
    def survival() -> np.ndarray:
        confidence = generator.beta(4.0, 1.0, (count, BLOCK))
        if shape == "many ties":
            confidence = np.ceil(confidence * 4) / 4
        return np.cumprod(confidence, axis=1)

    return DraftRound(
        survival=survival(),
        lagged_survival=survival(),
        limits=generator.integers(BLOCK // 2, BLOCK + 1, count),
        seconds=0.01 + 2e-4 * np.arange(count * (1 + BLOCK))[count - 1 :],
        base_tokens=count,
    )


def milliseconds(policy: DepthPolicy, draft_round: DraftRound, repeats: int) -> tuple[float, float]:
    """Median and minimum."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        policy.depths(draft_round)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    generator = np.random.default_rng(0)
    print(f"{'survival':14s} {'policy':14s} {'requests':>8s} {'verified':>8s} {'median ms':>10s} {'min ms':>8s}")
    for shape in SHAPES:
        for count in REQUESTS:
            draft_round = make_round(count, shape, generator)
            for name in POLICIES:
                policy = parse_policy(name)
                median, least = milliseconds(policy, draft_round, repeats)
                verified = int(policy.depths(draft_round).sum())
                print(f"{shape:14s} {name:14s} {count:8d} {verified:8d} {median:10.3f} {least:8.3f}")


if __name__ == "__main__":
    main()
