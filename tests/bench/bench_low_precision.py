"""What the quantised products of TensorRT's graphs cost a model: distance from float32 over a text, on the CPU.

ONNX Runtime runs the standard graph, in float32 between the products; int4 to the nearest and by GPTQ, which calibrates
with the dialogues of the package. ``--tokenizer`` is that of any artifact of the model.

Run: PYTHONPATH=tests/support python tests/bench/bench_low_precision.py --tokenizer DIR/tokenizer.json --text FILE
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import standard_graphs
from tokenizers import Tokenizer

from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.shared_weights import SHARED_EMBEDDING, SHARED_HEAD
from dspark_backend.tokenizer import TOKENIZER_FILE
from dspark_export.decoder import Decoder
from dspark_export.families import describe
from dspark_export.graph.standard_form import StandardForm
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.quantization.fp8 import norm_scales
from dspark_export.quantization.quality import measure_quality
from dspark_export.quantization.round_model import rounded_model
from dspark_export.quantization.texts import read_texts
from dspark_export.source import open_weights, resolve_model
from dspark_export.tokenizer_info import TokenizerInfo
from dspark_export.verifier import CALIBRATION_TOKENS
from dspark_export.weights import WeightSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS["int4"])
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    text = tokenizer.encode(options.text.read_text(encoding="utf-8")).ids[: options.tokens]
    weights = open_weights(resolve_model(options.model))
    decoder = describe(weights.config)
    expected = standard_logits(decoder, weights, text, StandardForm(len(text)))

    def tell(what: str, form: StandardForm) -> None:
        found = standard_logits(decoder, weights, text, form)
        quality = measure_quality(lambda _: expected, lambda _: found, [text], lambda _: None)
        print(f"{what}: {quality.tokens} tokens, KL {quality.kl:.4f} nats, same next token {quality.top1:.1%}")

    tell("fp8", StandardForm(len(text), "fp8", norm_scales(decoder, weights, "model.layers.")))
    tell("int4, nearest", StandardForm(len(text), "int4"))
    with tempfile.TemporaryDirectory() as folder:
        scratch, info = Path(folder), TokenizerInfo(None, (), None, None, None, None)
        shutil.copy(options.tokenizer, scratch / TOKENIZER_FILE)
        texts = read_texts(None, scratch, info, decoder.vocab_size, options.calibration_tokens, 512, len(text))
        begin = time.perf_counter()
        with rounded_model(decoder, weights, texts, "bfloat16", scratch, lambda *_: None) as rounded:
            took, memory = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"int4, gptq: {took:.0f} s, {memory / 2**20:.1f} GiB at most")
            tell("int4, gptq", StandardForm(len(text), "int4", rounded=rounded.weights))


def standard_logits(decoder: Decoder, weights: WeightSource, text: list[int], form: StandardForm) -> FloatArray:
    """Logits [T, V] of the text."""
    standard_graphs.CAPACITY = len(text)
    embedding = np.asarray(weights.read("model.embed_tokens.weight"), dtype=np.float32)
    head = embedding if decoder.tied_embedding else np.asarray(weights.read("lm_head.weight"), dtype=np.float32)
    graph = VerifierGraph(decoder, weights, (0,), len(text), "float32", standard=form).build()
    with tempfile.TemporaryDirectory() as folder:
        session = standard_graphs.open_graph(graph, Path(folder), "v.onnx")
    shared = {SHARED_EMBEDDING: embedding, SHARED_HEAD: head}
    return standard_graphs.verify(standard_graphs.Caches(session, slots=1), shared, [(0, 0, text)], len(text))["logits"]


if __name__ == "__main__":
    main()
