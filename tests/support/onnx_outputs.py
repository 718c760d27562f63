"""Running a built graph without an artifact around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dspark_export.graph.tape import save_graph


def run_verifier(graph: ir.Model, token_ids: list[int], folder: Path) -> np.ndarray:
    """Logits of all positions of one sequence, alone in the first slot: float32 [T, V]."""
    save_graph(graph, folder, "graph.onnx")
    session = ort.InferenceSession(str(folder / "graph.onnx"), providers=["CPUExecutionProvider"])
    count = np.arange(len(token_ids), dtype=np.int64)
    zeros = np.zeros_like(count)
    inputs = {
        "input_ids": np.array(token_ids, dtype=np.int64), "positions": count, "rows": zeros, "columns": count,
        "query_index": count[None], "logit_rows": count,
    }  # fmt: skip
    for value in session.get_inputs():
        if "_cache_" in value.name:
            shape = (1, value.shape[1], len(token_ids), value.shape[3])
            inputs[value.name] = np.zeros(shape, dtype=np.float32)
    logits: np.ndarray = session.run(["logits"], inputs)[0]
    return logits
