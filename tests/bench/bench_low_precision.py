"""What the quantised products of TensorRT's graphs cost a model: distance from float32 over a text, on the CPU.

ONNX Runtime runs the standard graph, in float32 between the products. ``--tokenizer`` is that of any artifact of it.

Run: PYTHONPATH=tests/support python tests/bench/bench_low_precision.py --tokenizer DIR/tokenizer.json --text FILE
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import standard_graphs
from tokenizers import Tokenizer

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD
from dspark_export.families import describe
from dspark_export.graph.standard_form import StandardForm
from dspark_export.graph.standard_linear import Products
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.quantization.fp8 import norm_scales
from dspark_export.quantization.quality import measure_quality
from dspark_export.source import open_weights, resolve_model

QUANTISED: tuple[Products, ...] = ("fp8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    text = tokenizer.encode(options.text.read_text(encoding="utf-8")).ids[: options.tokens]
    expected = standard_logits(options.model, "plain", text)
    for products in QUANTISED:
        found = standard_logits(options.model, products, text)
        quality = measure_quality(lambda _: expected, lambda _, found=found: found, [text], lambda _: None)
        print(f"{products}: {quality.tokens} tokens, KL {quality.kl:.4f} nats, same next token {quality.top1:.1%}")


def standard_logits(model: str, products: Products, text: list[int]) -> FloatArray:
    """Logits [T, V] of the text."""
    standard_graphs.CAPACITY = len(text)
    weights = open_weights(resolve_model(model))
    decoder = describe(weights.config)
    embedding = np.asarray(weights.read("model.embed_tokens.weight"), dtype=np.float32)
    head = embedding if decoder.tied_embedding else np.asarray(weights.read("lm_head.weight"), dtype=np.float32)
    scales = norm_scales(decoder, weights, "model.layers.") if products == "fp8" else {}
    form = StandardForm(len(text), products, scales)
    graph = VerifierGraph(decoder, weights, (0,), len(text), "float32", standard=form).build()
    with tempfile.TemporaryDirectory() as folder:
        session = standard_graphs.open_graph(graph, Path(folder), "v.onnx")
    shared = {SHARED_EMBEDDING: embedding, SHARED_HEAD: head}
    return standard_graphs.verify(standard_graphs.Caches(session, slots=1), shared, [(0, 0, text)], len(text))["logits"]


if __name__ == "__main__":
    main()
