"""What the products of a float32 graph read, over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.binding import open_session, outputs_of

INPUT_PREFIX = "input."
"""Output of a probing graph: what a product reads, followed by the product's fused name."""


@dataclass
class InputStatistics:
    """Of the rows x float32 [K] that one product reads."""

    largest: FloatArray
    """[K]: largest magnitude of each channel."""
    sample: FloatArray
    """[S, K]: some of the rows, from all over the text."""
    gram: FloatArray | None
    """[K, K]: sum of outer products of all rows; None where it would take too much memory."""


class Probe:
    """A float32 verifier graph whose products' inputs are outputs, run over whole texts."""

    def __init__(self, model: Path, threads: int = 0) -> None:
        self._session = open_session(model, threads)
        self._caches = {
            value.name: (value.shape[1], value.shape[3])
            for value in self._session.get_inputs()
            if value.name.startswith(("key_cache_", "value_cache_"))
        }
        names = [value.name for value in self._session.get_outputs()]
        self._inputs = [name for name in names if name.startswith(INPUT_PREFIX)]

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        """[T, V] of one text."""
        (found,) = outputs_of(self._session, ["logits"], self._feed(token_ids))
        return found

    def inputs(self, token_ids: Sequence[int]) -> dict[str, FloatArray]:
        """What each product reads, [T, K], by its fused name."""
        found = outputs_of(self._session, self._inputs, self._feed(token_ids))
        return {name.removeprefix(INPUT_PREFIX): value for name, value in zip(self._inputs, found, strict=True)}

    def _feed(self, token_ids: Sequence[int]) -> dict[str, NDArray[Any]]:
        count = len(token_ids)
        feed: dict[str, NDArray[Any]] = {
            "input_ids": np.asarray(token_ids, dtype=np.int64),
            "logit_rows": np.arange(count, dtype=np.int64),
        }
        return feed | text_places(count, self._caches)


def text_places(count: int, caches: Mapping[str, tuple[int, int]]) -> dict[str, NDArray[Any]]:
    """What places the tokens of one whole text in a graph; empty ``caches`` by name, (key heads, channels)."""
    places = np.arange(count, dtype=np.int64)
    zeros = np.zeros(count, dtype=np.int64)
    feed: dict[str, NDArray[Any]] = {
        "positions": places, "rows": zeros, "columns": places, "query_index": places[None],
    }  # fmt: skip
    for name, (heads, dim) in caches.items():
        feed[name] = np.zeros((1, heads, count, dim), dtype=np.float32)
    return feed


def input_statistics(
    probe: Probe,
    texts: Sequence[Sequence[int]],
    samples: int,
    gram_bytes: int,
    progress: Callable[[float], None],
) -> Mapping[str, InputStatistics]:
    """Statistics of every product over ``texts``. ``samples``: about how many rows to keep; ``gram_bytes``: most memory
    for Gram matrices, which are left out altogether where they need more."""
    found: dict[str, InputStatistics] = {}
    kept: dict[str, list[FloatArray]] = {}
    random = np.random.default_rng(0)
    total = sum(map(len, texts))
    for number, text in enumerate(texts):
        inputs = probe.inputs(text)
        if not found:
            # The channels of all products in all: whether their squares fit.
            with_gram = 4 * sum(rows.shape[1] ** 2 for rows in inputs.values()) <= gram_bytes
            for name, rows in inputs.items():
                size = rows.shape[1]
                gram = np.zeros((size, size), dtype=np.float32) if with_gram else None
                found[name] = InputStatistics(np.zeros(size, dtype=np.float32), rows[:0], gram)
                kept[name] = []
        chosen = random.random(len(text)) < samples / max(total, 1)
        for name, rows in inputs.items():
            statistics = found[name]
            np.maximum(statistics.largest, np.abs(rows).max(axis=0), out=statistics.largest)
            kept[name].append(rows[chosen])
            if statistics.gram is not None:
                statistics.gram += rows.T @ rows
        progress((number + 1) / len(texts))
    for name, parts in kept.items():
        found[name].sample = np.concatenate(parts)
    return found
