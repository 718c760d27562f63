"""Time of sampling one position, by setting, vocabulary and shape of the distribution.

Run: python tests/bench/bench_sampling.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dspark_backend.bad_words import BadWords, TokenMask
from dspark_backend.penalties import SamplingContext
from dspark_backend.request import SamplingParams
from dspark_backend.sampling import draw, log_probability, target_distribution

VOCABULARIES = (49152, 151936)
SHAPES = {"steep": 6.0, "peaked": 3.0, "broad": 1.0, "flat": 0.05}
"""Standard deviation of normal logits. A language model's are mostly "steep" to "peaked"."""
SETTINGS = {
    "temperature": SamplingParams(temperature=0.8),
    "top_p .9": SamplingParams(temperature=0.8, top_p=0.9),
    "min_p .05": SamplingParams(temperature=0.8, min_p=0.05),
    "top_k 50": SamplingParams(temperature=0.8, top_k=50),
    "top_k 50, top_p .9": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
    "top_k 20000": SamplingParams(temperature=0.8, top_k=20000),
    "penalties": SamplingParams(temperature=0.8, repetition_penalty=1.1, frequency_penalty=0.2),
    "greedy, penalties": SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2),
}


def milliseconds(action: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and minimum."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    repeats = parser.parse_args().repeats
    generator = np.random.default_rng(0)
    print(f"{'setting':22s} {'V':>7s} {'logits':>7s} {'median ms':>10s} {'min ms':>8s}")
    for size in VOCABULARIES:
        for shape, deviation in SHAPES.items():
            logits = generator.normal(0.0, deviation, size).astype(np.float32)
            for name, action in actions(logits, generator).items():
                median, least = milliseconds(action, repeats)
                print(f"{name:22s} {size:7d} {shape:>7s} {median:10.3f} {least:8.3f}")


def actions(logits: NDArray[np.float32], generator: np.random.Generator) -> dict[str, Callable[[], object]]:
    size = logits.size
    context = SamplingContext(generator.integers(0, size, 1000).tolist())
    context.extend(generator.integers(0, size, 500).tolist())
    words = BadWords(tuple(tuple(generator.integers(0, size, 1 + i % 4).tolist()) for i in range(256)))
    mask = TokenMask(words, min_tokens=1000, end_ids=(2,))
    plain = SETTINGS["temperature"]
    distribution = target_distribution(logits, plain, context)
    timed: dict[str, Callable[[], object]] = {
        name: partial(target_distribution, logits, params, context) for name, params in SETTINGS.items()
    }
    timed["256 bad words"] = partial(target_distribution, logits, plain, context, mask)
    timed["draw"] = partial(draw, distribution, 0.999)
    timed["log_probability"] = partial(log_probability, logits, 7)
    return timed


if __name__ == "__main__":
    main()
