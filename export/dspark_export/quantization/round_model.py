"""The int4 pass: every layer is rounded with what it reads behind layers that are rounded already (GPTQ)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dspark_backend.stages.batch import FloatArray
from dspark_export.decoder import Decoder
from dspark_export.graph.linear import fused_weight
from dspark_export.publish import Progress
from dspark_export.quantization.int4 import compensated_int4, fits_int4
from dspark_export.quantization.int4_weights import Int4Weights, RoundedSource, split_matrix
from dspark_export.quantization.layer_pass import LayerRun, embedded, end_run, layer_run
from dspark_export.quantization.plan import fused_parts
from dspark_export.quantization.quality import Quality, compare_logits
from dspark_export.quantization.texts import Texts
from dspark_export.weights import WeightSource

_PIECE = 128
"""Tokens whose logits are compared at a time."""


@dataclass(frozen=True)
class RoundedModel:
    """What the pass gives."""

    weights: Int4Weights
    quality: Quality
    """Of float32 arithmetic with the rounded weights, over text that the pass did not round with."""


@contextmanager
def rounded_model(
    decoder: Decoder, weights: WeightSource, texts: Texts, compute: str, scratch: Path, progress: Progress
) -> Iterator[RoundedModel]:  # fmt: skip
    """Round every product that int4 reaches; scales are of the dtype ``compute``.

    Files are below ``scratch`` and go at the end. In memory at a time: one layer in float32 with the Gram matrices of
    its products, and the residual streams.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".int4-") as folder:
        rounded, dtype = Int4Weights(Path(folder)), np.dtype(getattr(ml_dtypes, compute, compute))
        longest = max(map(len, texts.calibration + texts.held_out))
        fitted = embedded(decoder, weights, texts.calibration)
        exact = embedded(decoder, weights, texts.held_out)
        judged = exact
        for layer in range(decoder.num_layers):
            progress("round layer by layer", layer / decoder.num_layers)
            with layer_run(decoder, weights, layer, longest, rounded.directory, probe=True) as run:
                grams = gram_matrices(run, fitted)
                exact = [run.stream(stream) for stream in exact]
            arrays = _round_layer(weights, grams, dtype, rounded)
            changed = RoundedSource(weights, arrays)
            with layer_run(decoder, changed, layer, longest, rounded.directory) as run:
                fitted, judged = ([run.stream(stream) for stream in streams] for streams in (fitted, judged))
        with end_run(decoder, weights, rounded.directory) as logits:
            pairs = zip(_pieces(exact), _pieces(judged), strict=True)
            quality = compare_logits((logits(before), logits(after)) for before, after in pairs)
        yield RoundedModel(rounded, quality)


def gram_matrices(run: LayerRun, streams: Sequence[FloatArray]) -> dict[str, FloatArray]:
    """Sums of outer products [K, K] of what each product reads, by its fused name."""
    grams: dict[str, FloatArray] = {}
    for stream in streams:
        for name, rows in run.inputs(stream).items():
            product = rows.T @ rows
            if name in grams:
                grams[name] += product
            else:
                grams[name] = product
    return grams


def _round_layer(
    weights: WeightSource, grams: dict[str, FloatArray], dtype: np.dtype[Any], rounded: Int4Weights
) -> dict[str, FloatArray]:  # fmt: skip
    """Round a layer's products into ``rounded``; returns their tensors as rounded. Takes the ``grams`` with it."""
    arrays: dict[str, FloatArray] = {}
    for name in list(grams):
        matrix, gram = fused_weight(weights, fused_parts(name)).astype(np.float32), grams.pop(name)
        if fits_int4(*matrix.shape):
            found = compensated_int4(matrix, gram, dtype)
            rounded.put(name, found)
            arrays |= split_matrix(name, found.dequantised(), weights)
    return arrays


def _pieces(streams: Sequence[FloatArray]) -> Iterator[FloatArray]:
    """A text's logits of a large vocabulary take gigabytes."""
    for stream in streams:
        for first in range(0, len(stream), _PIECE):
            yield stream[first : first + _PIECE]
