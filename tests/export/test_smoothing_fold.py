"""Smoothing is folded into what makes a product's input: without rounding, it changes nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import tiny_llama
import tiny_models
from onnx_outputs import run_verifier

from dspark_export.decoder import Decoder
from dspark_export.families import describe
from dspark_export.graph.linear import FloatLinears, fused_bias, fused_weight
from dspark_export.graph.verifier import VerifierGraph
from dspark_export.quantization.plan import fused_name
from dspark_export.source import open_weights


class SmoothedLinears(FloatLinears):
    """Float products that want their inputs divided by random factors."""

    decoder: Decoder

    def smoothing(self, names):
        if not names or names[0].endswith("lm_head") or "embed_tokens" in names[0]:
            return None
        random = np.random.default_rng(sum(map(ord, fused_name(names))))
        if not names[0].endswith("o_proj"):
            return np.exp(random.standard_normal(self.weights.shape(f"{names[0]}.weight")[1])).astype(np.float32)
        attention = self.decoder.layer_attention(int(names[0].split(".")[2]))
        heads = np.exp(random.standard_normal((attention.num_kv_heads, 1, attention.head_dim))).astype(np.float32)
        return np.repeat(heads, attention.group, axis=1).ravel()

    def apply(self, value, names, inner, bias, divisors=None):
        factors = self.smoothing(names)
        columns = np.concatenate(
            [(divisors or {}).get(name, np.ones(self.weights.shape(f"{name}.weight")[0], np.float32)) for name in names]
        )
        weight = fused_weight(self.weights, names) * factors[:, None] / columns
        product = self.tape.op("MatMul", value, self.tape.table(f"{fused_name(names)}.smooth", weight))
        if not bias:
            return product
        offset = fused_bias(self.weights, names) / columns
        return self.tape.op("Add", product, self.tape.table(f"{fused_name(names)}.offset", offset))


class SmoothedGraph(VerifierGraph):
    def _linears(self, rows):
        made = SmoothedLinears(self._tape, self._weights)
        object.__setattr__(made, "decoder", self._decoder)
        return made


@pytest.mark.parametrize("name", tiny_models.RECIPES)
def test_folding(name, tmp_path):
    model = tiny_models.make(name, tmp_path / "model")
    weights = open_weights(tmp_path / "model")
    graph: ir.Model = SmoothedGraph(describe(weights.config), weights, (0,), 128).build()
    tokens = tiny_llama.tokens(40)
    found = run_verifier(graph, tokens, tmp_path)
    np.testing.assert_allclose(found, tiny_llama.logits(model, tokens), rtol=0, atol=1e-4)
