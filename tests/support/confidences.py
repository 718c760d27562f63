"""Rounds of a drafter whose calibration is known."""

from __future__ import annotations

import numpy as np

from dspark_backend.calibration import sigmoid


def observed_rounds(true_temperatures, count, seed=0, biases=0.0):
    """Logits whose true conditional acceptance is sigmoid(z / T + b), and how many drafts stood: [N, g], [N]."""
    random = np.random.default_rng(seed)
    temperatures = np.asarray(true_temperatures, dtype=np.float64)
    logits = random.normal(1.0, 2.5, (count, len(temperatures))).astype(np.float32)
    stands = random.random(logits.shape) < sigmoid(logits / temperatures + biases)
    return logits, np.cumprod(stands, axis=1).sum(axis=1)
