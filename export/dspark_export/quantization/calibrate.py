"""The calibration pass: a float32 graph is run over text, and says how each product is brought to int8."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.onnxruntime_verifier import MODEL_FILE, OnnxRuntimeVerifier
from dspark_export.check import prompt_logits
from dspark_export.decoder import Decoder
from dspark_export.graph.blocks import output_names
from dspark_export.graph.linear import fused_weight
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.publish import Progress
from dspark_export.quantization.activations import Probe, input_statistics
from dspark_export.quantization.choose import choose_all
from dspark_export.quantization.plan import Int8Plan, fused_parts
from dspark_export.quantization.quality import Quality, measure_quality
from dspark_export.quantization.texts import Texts
from dspark_export.weights import WeightSource

_SAMPLES = 160
"""Rows of each product that smoothing is chosen on."""
_GRAM_BYTES = 2 << 30
"""Models whose Gram matrices need more are rounded to the nearest."""


@dataclass(frozen=True)
class Calibration:
    """A target with its float32 graph at hand."""

    decoder: Decoder
    weights: WeightSource
    texts: Texts
    probe: Probe

    def plan(self, progress: Progress) -> Int8Plan:
        """How every product is brought to int8."""
        statistics = input_statistics(
            self.probe,
            self.texts.calibration,
            _SAMPLES,
            _GRAM_BYTES,
            lambda done: progress("look at activations", done),
        )
        layers = {output_names(f"model.layers.{layer}")[0]: layer for layer in range(self.decoder.num_layers)}

        def head_layout(name: str) -> tuple[int, int]:
            if name not in layers:
                return 0, 1
            attention = self.decoder.layer_attention(layers[name])
            return attention.head_dim, attention.group

        def weight(name: str) -> FloatArray:
            return fused_weight(self.weights, fused_parts(name))

        plans = choose_all(
            statistics,
            weight,
            head_layout,
            lambda done: progress("choose how to round", done),
        )
        return Int8Plan(plans)

    def quality(self, directory: Path, progress: Progress) -> Quality:
        """Of the int8 artifact in ``directory``, over text that the plan was not made with."""
        stage = OnnxRuntimeVerifier(directory)
        try:
            return measure_quality(
                self.probe.logits,
                lambda text: prompt_logits(stage, list(text), len(text)),
                self.texts.held_out,
                lambda done: progress("compare with float32", done),
            )
        finally:
            stage.close()


@contextmanager
def calibration(
    decoder: Decoder, weights: WeightSource, texts: Texts, scratch: Path, progress: Progress
) -> Iterator[Calibration]:  # fmt: skip
    """Builds the float32 graph below ``scratch`` and removes it at the end."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".float32-") as folder:
        longest = max(map(len, texts.calibration + texts.held_out))
        graph = VerifierGraph(decoder, weights, (0,), longest, "float32", probe=True).build()
        save_graph(graph, Path(folder), MODEL_FILE, lambda done: progress("write the float32 graph", done))
        yield Calibration(decoder, weights, texts, Probe(Path(folder) / MODEL_FILE))
