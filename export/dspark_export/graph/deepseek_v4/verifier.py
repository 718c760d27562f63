"""The whole verifier of a DeepSeek-V4 model, with the inputs and outputs of every other verifier graph.

Features are the mean over the residual streams behind a tapped layer. So quote public accounts the reference code of
the checkpoints with a DSpark drafter (layers 40 to 42 of 43: ``h = layer(h, ...)``, then ``h.mean(dim=2)``), and vLLM
takes the mean as well; no released drafter was run on these features here. DeepSeek-V4.1, which is not built, reads the
streams *before* its layers.
"""

from __future__ import annotations

import onnx_ir as ir

from dspark_export.deepseek_v4 import DeepSeekV4
from dspark_export.graph.deepseek_v4.attention import Caches
from dspark_export.graph.deepseek_v4.hyper import expand, join, mean
from dspark_export.graph.deepseek_v4.layer import decoder_layer
from dspark_export.graph.deepseek_v4.parts import Parts
from dspark_export.graph.deepseek_v4.place import Place, place, rope_tables
from dspark_export.graph.layout import RaggedInputs
from dspark_export.graph.linear import FloatLinears
from dspark_export.graph.ort_dialect import OrtDialect
from dspark_export.graph.tape import GraphTape, graph_input, graph_output
from dspark_export.graph.verifier import EMBEDDING, HEAD
from dspark_export.weights import WeightSource
from dspark_export.weights.deepseek_v4_names import ReleasedNames


class DeepSeekV4Graph:
    """Builds the graph of one decoder. ``build`` may be called once."""

    def __init__(
        self,
        decoder: DeepSeekV4,
        weights: WeightSource,
        taps: tuple[int, ...],
        max_context: int,
        weight_dtype: str = "float32",
    ) -> None:
        self._parts = Parts(OrtDialect(GraphTape(weight_dtype)), decoder, ReleasedNames(weights))
        self._taps = taps
        self._max_context = max_context

    def build(self) -> ir.Model:
        """The whole model; weights are read when it is saved.

        Raises:
            ExportError: a tensor is missing.
        """
        parts, decoder, tape = self._parts, self._parts.decoder, self._parts.tape
        hidden = decoder.hidden_size
        input_ids = graph_input("input_ids", ir.DataType.INT64, ("B",))
        positions = graph_input("positions", ir.DataType.INT64, ("B",))
        rows = graph_input("rows", ir.DataType.INT64, ("B",))
        columns = graph_input("columns", ir.DataType.INT64, ("B",))
        query_index = graph_input("query_index", ir.DataType.INT64, ("R", "Q"))
        logit_rows = graph_input("logit_rows", ir.DataType.INT64, ("N",))
        caches = [
            graph_input(f"{kind}_cache_{layer}", ir.DataType.FLOAT, ("R", heads, "C", width))
            for layer, (heads, width) in enumerate(decoder.cache_shapes)
            for kind in ("key", "value")
        ]
        where = self._place(RaggedInputs(positions, rows, columns, query_index, positions, positions), caches[0])
        embedding = tape.weight(
            f"{EMBEDDING}.weight", (decoder.vocab_size, hidden), lambda: parts.weights.read(f"{EMBEDDING}.weight")
        )
        streams = expand(parts, tape.op("Gather", embedding, input_ids, axis=0))
        features, written = [], []
        for layer, (heads, width) in enumerate(decoder.cache_shapes):
            own = Caches(caches[2 * layer], caches[2 * layer + 1])
            streams, after = decoder_layer(parts, layer, streams, input_ids, own, where)
            if layer in self._taps:
                features.append(mean(parts, streams))
            written += [
                graph_output(cache, f"{kind}_cache_{layer}_out", ir.DataType.FLOAT, ("R", heads, "C", width))
                for kind, cache in (("key", after.keys), ("value", after.values))
            ]

        joined = join(parts, tape.op("Gather", streams, logit_rows, axis=0))
        normed = parts.norm(joined, "norm", hidden)
        head = EMBEDDING if decoder.tied_embedding else HEAD
        logits = FloatLinears(tape, parts.weights).head(normed, head, decoder.vocab_size, hidden)
        # TopK for the reasons that graph.verifier gives.
        top, best = tape.op("TopK", logits, tape.constant([1]), outputs=2, axis=1)
        tapped = tape.op("Concat", *features, axis=1) if len(features) > 1 else tape.op("Identity", features[0])
        outputs = [
            graph_output(logits, "logits", ir.DataType.FLOAT, ("N", decoder.vocab_size)),
            graph_output(tape.reshape(best, (-1,)), "argmax", ir.DataType.INT64, ("N",)),
            graph_output(tape.reshape(top, (-1,)), "top_logit", ir.DataType.FLOAT, ("N",)),
            graph_output(tapped, "features", ir.DataType.FLOAT, ("B", len(self._taps) * hidden)),
            *written,
        ]
        inputs = [input_ids, positions, rows, columns, query_index, logit_rows, *caches]
        return tape.model("verifier", inputs, outputs, {"dspark.stage": "verifier", "dspark.family": decoder.family})

    def _place(self, inputs: RaggedInputs, cache: ir.Value) -> Place:
        parts, decoder = self._parts, self._parts.decoder
        assert decoder.attention.window is not None
        return place(
            parts.dialect,
            inputs,
            cache,
            decoder.attention.window,
            rope_tables(parts.tape, (decoder.attention.rope, decoder.compressed_rope), self._max_context),
            decoder.compressed_rope,
            {compression.rate for compression in decoder.compressions if compression is not None},
            self._max_context,
        )
