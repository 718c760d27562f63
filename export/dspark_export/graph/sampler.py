"""The graph behind a verifier's: what a draw needs of its logits, so that they stay on the device."""

from __future__ import annotations

import onnx_ir as ir

from dspark_backend.stages.engine_contract import SamplerTensors
from dspark_export.graph.standard_dialect import STANDARD_OPSET
from dspark_export.graph.tape import GraphTape, graph_input, graph_output


def sampler_graph(vocab_size: int) -> ir.Model:
    """Inputs and outputs as :class:`~dspark_backend.stages.engine_contract.SamplerTensors` says; float32."""
    count = SamplerTensors(vocab_size).num_ranked
    tape = GraphTape("float32", STANDARD_OPSET)
    logits = graph_input("logits", ir.DataType.FLOAT, ("N", vocab_size))
    temperature = graph_input("temperature", ir.DataType.FLOAT, ("N",))
    column = tape.constant([1])
    best, ids = tape.op("TopK", logits, tape.constant([count]), outputs=2, axis=1)
    largest = tape.op("Slice", best, tape.constant([0]), column, column)
    # The largest logit is subtracted first: small temperatures stay exact, and no weight is above 1.
    scores = tape.op("Div", tape.op("Sub", logits, largest), tape.op("Unsqueeze", temperature, column))
    total = tape.op("ReduceSum", tape.op("Exp", scores), column, keepdims=0)
    outputs = [
        graph_output(ids, "ranked_ids", ir.DataType.INT64, ("N", count)),
        graph_output(best, "ranked_logits", ir.DataType.FLOAT, ("N", count)),
        graph_output(total, "exp_sum", ir.DataType.FLOAT, ("N",)),
    ]
    return tape.model("sampler", [logits, temperature], outputs, {"dspark.stage": "sampler"})
