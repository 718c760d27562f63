"""A model run one layer at a time over texts, so that a machine needs room for a layer and not for the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.binding import open_session, outputs_of
from dspark_export.decoder import Decoder
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import EMBEDDING, VerifierGraph
from dspark_export.quantization.activations import INPUT_PREFIX, text_places
from dspark_export.weights import WeightSource

_FILE = "part.onnx"


def embedded(decoder: Decoder, weights: WeightSource, texts: Sequence[Sequence[int]]) -> list[FloatArray]:
    """The residual stream before the first layer: float32 [T, H] of every text."""
    table = weights.read(f"{EMBEDDING}.weight")
    scale = np.float32(decoder.embedding_scale)
    return [table[np.asarray(text)].astype(np.float32) * scale for text in texts]


class LayerRun:
    """One layer in float32."""

    def __init__(self, graph: Path) -> None:
        self._session = open_session(graph, 0)
        self._caches = {
            value.name: (value.shape[1], value.shape[3])
            for value in self._session.get_inputs()
            if value.name in ("key_cache", "value_cache")
        }
        self._inputs = [
            value.name for value in self._session.get_outputs() if value.name.startswith(INPUT_PREFIX)
        ]  # fmt: skip

    def stream(self, stream: FloatArray) -> FloatArray:
        """The residual stream [T, H] of one text after the layer."""
        (found,) = outputs_of(self._session, ["stream_out"], self._feed(stream))
        return found

    def inputs(self, stream: FloatArray) -> dict[str, FloatArray]:
        """What each product reads, [T, K], by its fused name."""
        found = outputs_of(self._session, self._inputs, self._feed(stream))
        return {name.removeprefix(INPUT_PREFIX): value for name, value in zip(self._inputs, found, strict=True)}

    def _feed(self, stream: FloatArray) -> dict[str, FloatArray]:
        return text_places(len(stream), self._caches) | {"stream": stream}


@contextmanager
def layer_run(
    decoder: Decoder, weights: WeightSource, layer: int, longest: int, scratch: Path, probe: bool = False
) -> Iterator[LayerRun]:  # fmt: skip
    """A layer for texts of up to ``longest`` tokens; ``probe``: with what its products read. Its file is below
    ``scratch``."""
    graph = VerifierGraph(decoder, weights, (), longest, probe=probe).build_layer(layer)
    with _saved(graph, scratch) as path:
        yield LayerRun(path)


@contextmanager
def end_run(decoder: Decoder, weights: WeightSource, scratch: Path) -> Iterator[Callable[[FloatArray], FloatArray]]:
    """Logits [T, V] of the residual stream [T, H] after the last layer."""
    with _saved(VerifierGraph(decoder, weights, (), 1).build_end(), scratch) as path:
        session = open_session(path, 0)
        yield lambda stream: outputs_of(session, ["logits"], {"stream": stream})[0]


@contextmanager
def _saved(graph: ir.Model, scratch: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".layer-") as folder:
        save_graph(graph, Path(folder), _FILE)
        yield Path(folder) / _FILE
