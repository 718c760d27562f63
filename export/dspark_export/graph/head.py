"""The sequential head, unrolled: Markov bias, draw and confidence of every slot, left to right (DESIGN)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.drafter_spec import DrafterSpec
from dspark_export.graph.blocks import Blocks
from dspark_export.graph.linear import Linears
from dspark_export.graph.tape import graph_input

MAX_CANDIDATES = 64
"""A draft is drawn from the most probable tokens alone. The proposal is then exactly these K probabilities, so that
acceptance never has to move a vocabulary's worth of numbers; losslessness holds for any proposal."""


@dataclass(frozen=True)
class Drawn:
    """What the head produced for a block."""

    tokens: ir.Value
    """int64 [R, g]: target token ids."""
    candidates: ir.Value
    """int64 [R, g, K]: target token ids that could have been drawn, most probable first."""
    probabilities: ir.Value
    """float32 [R, g, K]: with which probability each was drawn; sums to 1."""
    confidence: ir.Value
    """float32 [R, g]: logits of the acceptance probability; large where the drafter has no confidence head."""
    logits: ir.Value
    """float32 [R, g, Vd]: U_k + B_k."""


class SequentialHead:
    """Builds the head on the blocks' tape."""

    def __init__(self, spec: DrafterSpec, blocks: Blocks, vocabulary: Linears, requests: str = "R") -> None:
        """``vocabulary`` builds the one large product, W2; what is small stays in the compute dtype.
        ``requests`` names their dimension."""
        self._spec = spec
        self._blocks = blocks
        self._vocabulary = vocabulary
        self._tape = blocks.tape
        self.num_candidates = min(MAX_CANDIDATES, spec.draft_vocab_size)
        self._uniforms = graph_input("uniforms", ir.DataType.FLOAT, (requests, spec.block_size))
        self._temperature = graph_input("temperature", ir.DataType.FLOAT, (requests,))
        self._top_k = graph_input("top_k", ir.DataType.INT64, (requests,))
        self._top_p = graph_input("top_p", ir.DataType.FLOAT, (requests,))
        self._min_p = graph_input("min_p", ir.DataType.FLOAT, (requests,))

    @property
    def inputs(self) -> list[ir.Value]:
        """uniforms float32 [R, g] in [0, 1); temperature > 0, top_k >= 1, top_p and min_p [R]. Greedy means top_k 1."""
        return [self._uniforms, self._temperature, self._top_k, self._top_p, self._min_p]

    def build(self, anchors: ir.Value, hidden: ir.Value, base: ir.Value) -> Drawn:
        """Unroll over ``hidden`` [R, g, H] and ``base`` logits [R, g, Vd], starting from ``anchors`` [R]."""
        spec, tape = self._spec, self._tape
        rank, vocab = spec.markov_rank, spec.decoder.vocab_size
        first = self._blocks.matrix("markov_head.markov_w1.weight", vocab, rank)
        to_target = None
        if spec.draft_vocab_size != vocab:
            to_target = tape.table("d2t", self._blocks.weights.read("d2t").astype(np.int64))
        steps: list[tuple[ir.Value, ...]] = []
        previous, state = anchors, self._initial_state(anchors)
        for slot in range(spec.block_size):
            pick = tape.constant(slot)
            h = tape.op("Gather", hidden, pick, axis=1)  # [R, H]
            u = tape.op("Gather", base, pick, axis=1)  # [R, Vd]
            e = tape.op("Gather", first, previous, axis=0)  # [R, r]
            confidence = self._confidence(h, e)
            mixed, state = self._mix(h, e, state)
            bias = self._vocabulary.apply(mixed, ("markov_head.markov_w2",), rank, bias=False)
            logits = tape.to_float(tape.op("Add", u, bias))
            previous, candidates, probabilities = self._draw(logits, slot, to_target)
            steps.append((previous, candidates, probabilities, confidence, logits))
        stacked = [
            tape.op("Concat", *(tape.op("Unsqueeze", value, tape.constant([1])) for value in column), axis=1)
            for column in zip(*steps, strict=True)
        ]
        return Drawn(*stacked)

    def _initial_state(self, anchors: ir.Value) -> ir.Value | None:
        if self._spec.head != "rnn":
            return None
        shape = self._tape.op(
            "Concat", self._tape.op("Shape", anchors), self._tape.constant([self._spec.markov_rank]), axis=0
        )
        state: ir.Value = self._tape.op("Expand", self._tape.number(0.0), shape)
        return state

    def _mix(self, h: ir.Value, e: ir.Value, state: ir.Value | None) -> tuple[ir.Value, ir.Value | None]:
        """What W2 multiplies, and the next state: e, a gated e, or the RNN's output."""
        spec, tape, blocks = self._spec, self._tape, self._blocks
        rank, hidden = spec.markov_rank, spec.decoder.hidden_size
        if spec.head == "vanilla":
            return e, None
        if spec.head == "gated":
            joined = tape.op("Concat", h, e, axis=1)
            gate = tape.op(
                "Sigmoid", blocks.linears.apply(joined, ("markov_head.gate_proj",), hidden + rank, bias=True)
            )
            return tape.op("Mul", gate, e), None
        joined = tape.op("Concat", state, e, h, axis=1)
        projected = blocks.linears.apply(joined, ("markov_head.joint_proj",), hidden + 2 * rank, bias=True)
        gate, candidate, output = tape.op("Split", projected, outputs=3, axis=1, num_outputs=3)
        gate = tape.op("Sigmoid", gate)
        kept = tape.op("Mul", gate, state)
        fresh = tape.op("Mul", tape.op("Sub", tape.number(1.0), gate), tape.op("Tanh", candidate))
        return tape.op("Tanh", output), tape.op("Add", kept, fresh)

    def _confidence(self, h: ir.Value, e: ir.Value) -> ir.Value:
        """w . [h_k; W1[x_{k-1}]] + b, [R]. It never sees x_k."""
        spec, tape = self._spec, self._tape
        if not spec.confidence:
            zeros = tape.op("Mul", tape.op("Cast", self._top_k, to=ir.DataType.FLOAT), tape.constant(0.0, np.float32))
            certain: ir.Value = tape.op("Add", zeros, tape.constant(30.0, np.float32))
            return certain
        seen = tape.op("Concat", h, e, axis=1) if spec.confidence_with_markov else h
        width = spec.decoder.hidden_size + (spec.markov_rank if spec.confidence_with_markov else 0)
        logit = self._blocks.linears.apply(seen, ("confidence_head.proj",), width, spec.confidence_bias)
        flat: ir.Value = tape.op("Squeeze", tape.to_float(logit), tape.constant([1]))
        return flat

    def _draw(
        self, logits: ir.Value, slot: int, to_target: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:  # fmt: skip
        """Token [R], candidates and their probabilities [R, K], by inverse CDF of one uniform each.

        min-p, top-k and top-p each keep a head of the ranking, as :mod:`dspark_backend.sampling` does for the target.
        """
        tape, count = self._tape, self.num_candidates
        column, one = tape.constant([1]), tape.constant(1.0, np.float32)
        best, index = tape.op("TopK", logits, tape.constant([count]), outputs=2, axis=1)
        candidates = index if to_target is None else tape.op("Gather", to_target, index, axis=0)
        scaled = tape.op("Div", best, tape.op("Unsqueeze", self._temperature, column))
        weights = tape.op("Softmax", scaled, axis=1)
        largest = tape.op("Slice", weights, tape.constant([0]), tape.constant([1]), column)
        threshold = tape.op("Mul", largest, tape.op("Unsqueeze", self._min_p, column))
        rank = tape.constant(np.arange(count).reshape(1, count))
        keep = tape.op(
            "And",
            tape.op("GreaterOrEqual", weights, threshold),
            tape.op("Less", rank, tape.op("Unsqueeze", self._top_k, column)),
        )
        weights = tape.op("Mul", weights, tape.op("Cast", keep, to=ir.DataType.FLOAT))
        total = tape.op("ReduceSum", weights, column, keepdims=1)
        before = tape.op("CumSum", weights, tape.constant(1), exclusive=1)
        nucleus = tape.op("Mul", total, tape.op("Unsqueeze", self._top_p, column))
        inside = tape.op("Less", before, nucleus)
        weights = tape.op("Mul", weights, tape.op("Cast", inside, to=ir.DataType.FLOAT))
        probabilities = tape.op("Div", weights, tape.op("ReduceSum", weights, column, keepdims=1))

        uniform = tape.op("Unsqueeze", tape.op("Gather", self._uniforms, tape.constant(slot), axis=1), column)
        cumulated = tape.op("CumSum", probabilities, tape.constant(1))
        passed = tape.op("Cast", tape.op("LessOrEqual", cumulated, uniform), to=ir.DataType.FLOAT)
        # The sum may round to just below 1: a uniform above it must not reach a token of probability 0.
        possible = tape.op(
            "Cast", tape.op("Greater", probabilities, tape.constant(0.0, np.float32)), to=ir.DataType.FLOAT
        )
        last = tape.op("Sub", tape.op("ReduceSum", possible, column, keepdims=1), one)
        place = tape.op("Min", tape.op("ReduceSum", passed, column, keepdims=1), last)
        chosen = tape.op("GatherElements", candidates, tape.op("Cast", place, to=ir.DataType.INT64), axis=1)
        return tape.op("Squeeze", chosen, column), candidates, probabilities
