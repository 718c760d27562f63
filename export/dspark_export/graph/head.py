"""The sequential head: Markov bias, draw and confidence of every slot, left to right (DESIGN)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dspark_export.drafter_spec import DrafterSpec
from dspark_export.graph.blocks import Blocks
from dspark_export.graph.draft_block import WIDTH
from dspark_export.graph.linear import Linears
from dspark_export.graph.tape import graph_input

MAX_CANDIDATES = 64
"""A draft is drawn from the most probable tokens alone. The proposal is then exactly these K probabilities, so that
acceptance never has to move a vocabulary's worth of numbers; losslessness holds for any proposal."""


@dataclass(frozen=True)
class Drawn:
    """What the head produced for a block."""

    tokens: ir.Value
    """int64 [R, m]: target token ids."""
    candidates: ir.Value
    """int64 [R, m, K]: target token ids that could have been drawn, most probable first."""
    probabilities: ir.Value
    """float32 [R, m, K]: with which probability each was drawn; sums to 1."""
    confidence: ir.Value
    """float32 [R, m]: logits of the acceptance probability; large where the drafter has no confidence head."""
    logits: ir.Value | None = None
    """float32 [R, m, Vd]: U_k + B_k, where asked for."""


@dataclass(frozen=True)
class _Slots:
    """What the slots of a block read."""

    hidden: ir.Value
    base: ir.Value
    first: ir.Value
    """W1 [V, r]"""
    to_target: ir.Value | None
    """[Vd]: target ids of the drafter's tokens, where it has fewer."""
    with_logits: bool
    """Whether all logits of a slot are wanted, too."""


class SequentialHead:
    """Builds the head on the blocks' tape: a loop over as many slots as there are uniforms, or, where ``unrolled``,
    every slot of a whole block one after another."""

    def __init__(
        self, spec: DrafterSpec, blocks: Blocks, vocabulary: Linears, requests: str = "R", unrolled: bool = False
    ) -> None:
        """``vocabulary`` builds the one large product, W2; what is small stays in the compute dtype.
        ``requests`` names their dimension."""
        self._spec = spec
        self._blocks = blocks
        self._vocabulary = vocabulary
        self._tape = tape = blocks.tape
        self._unrolled = unrolled
        self.num_candidates = min(MAX_CANDIDATES, spec.draft_vocab_size)
        self._uniforms = graph_input(
            "uniforms", ir.DataType.FLOAT, (requests, spec.block_size if unrolled else WIDTH)
        )  # fmt: skip
        self.width: ir.Value = (
            tape.constant([spec.block_size]) if unrolled else tape.op("Shape", self._uniforms, start=1, end=2)
        )
        """int64 [1]: m, the slots of a block."""
        self._temperature = graph_input("temperature", ir.DataType.FLOAT, (requests,))
        self._top_k = graph_input("top_k", ir.DataType.INT64, (requests,))
        self._top_p = graph_input("top_p", ir.DataType.FLOAT, (requests,))
        self._min_p = graph_input("min_p", ir.DataType.FLOAT, (requests,))

        self._columns: dict[ir.Value, ir.Value] = {}

    @property
    def inputs(self) -> list[ir.Value]:
        """uniforms float32 [R, m] in [0, 1); temperature > 0, top_k >= 1, top_p and min_p [R]. Greedy means top_k 1."""
        return [self._uniforms, self._temperature, self._top_k, self._top_p, self._min_p]

    def build(self, anchors: ir.Value, hidden: ir.Value, base: ir.Value, with_logits: bool = False) -> Drawn:
        """Over ``hidden`` [R, m, H] and ``base`` logits [R, m, Vd], from ``anchors`` [R]."""
        spec, tape = self._spec, self._tape
        rank, vocab = spec.markov_rank, spec.decoder.vocab_size
        first = self._blocks.matrix("markov_head.markov_w1.weight", vocab, rank)
        to_target = None
        if spec.draft_vocab_size != vocab:
            to_target = tape.table("d2t", self._blocks.weights.read("d2t").astype(np.int64))
        slots = _Slots(hidden, base, first, to_target, with_logits)
        state = self._initial_state(anchors)
        carried = [anchors] if state is None else [anchors, state]
        stacked = self._one_by_one(slots, carried) if self._unrolled else self._looped(slots, carried)
        return Drawn(*stacked)

    def _one_by_one(self, slots: _Slots, carried: list[ir.Value]) -> list[ir.Value]:
        tape, steps = self._tape, []
        for slot in range(self._spec.block_size):
            carried, drawn = self._slot(slots, tape.constant(slot), carried)
            steps.append(drawn)
        return [
            tape.op("Concat", *(tape.op("Unsqueeze", value, tape.constant([1])) for value in column), axis=1)
            for column in zip(*steps, strict=True)
        ]

    def _looped(self, slots: _Slots, carried: list[ir.Value]) -> list[ir.Value]:
        gathered = self._tape.loop(self.width, carried, lambda place, before: self._slot(slots, place, before))
        by_slot = gathered[len(carried) :]
        return [
            self._tape.op("Transpose", value, perm=[1, 0, *range(2, rank)])
            for value, rank in zip(by_slot, (2, 3, 3, 2, 3), strict=False)
        ]

    def _slot(
        self, slots: _Slots, place: ir.Value, carried: list[ir.Value]
    ) -> tuple[list[ir.Value], tuple[ir.Value, ...]]:
        """What the next slot is told, and token [R], candidates and probabilities [R, K], confidence [R]; logits."""
        tape, previous, state = self._tape, carried[0], carried[1] if len(carried) > 1 else None
        h = tape.op("Gather", slots.hidden, place, axis=1)  # [R, H]
        u = tape.op("Gather", slots.base, place, axis=1)  # [R, Vd]
        e = tape.op("Gather", slots.first, previous, axis=0)  # [R, r]
        confidence = self._confidence(h, e)
        mixed, state = self._mix(h, e, state)
        bias = self._vocabulary.apply(mixed, ("markov_head.markov_w2",), self._spec.markov_rank, bias=False)
        logits = tape.to_float(tape.op("Add", u, bias))
        token, candidates, probabilities = self._draw(logits, place, slots.to_target)
        following = [token] if state is None else [token, state]
        drawn = (token, candidates, probabilities, confidence)
        return following, (*drawn, logits) if slots.with_logits else drawn

    def _initial_state(self, anchors: ir.Value) -> ir.Value | None:
        if self._spec.head != "rnn":
            return None
        shape = self._tape.op(
            "Concat", self._tape.op("Shape", anchors), self._tape.constant([self._spec.markov_rank]), axis=0
        )
        state: ir.Value = self._tape.op("Expand", self._tape.number(0.0), shape)
        state.dtype, state.shape = self._tape.compute, ir.Shape((None, self._spec.markov_rank))
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
        self, logits: ir.Value, place: ir.Value, to_target: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:  # fmt: skip
        """Token [R], candidates and their probabilities [R, K], by inverse CDF of one uniform each.

        min-p, top-k and top-p each keep a head of the ranking, as :mod:`dspark_backend.sampling` does for the target.
        """
        tape, count = self._tape, self.num_candidates
        column, one = tape.constant([1]), tape.constant(1.0, np.float32)
        best, index = tape.op("TopK", logits, tape.constant([count]), outputs=2, axis=1)
        candidates = index if to_target is None else tape.op("Gather", to_target, index, axis=0)
        scaled = tape.op("Div", best, self._column(self._temperature))
        weights = tape.op("Softmax", scaled, axis=1)
        largest = tape.op("Slice", weights, tape.constant([0]), tape.constant([1]), column)
        threshold = tape.op("Mul", largest, self._column(self._min_p))
        rank = tape.constant(np.arange(count).reshape(1, count))
        keep = tape.op(
            "And",
            tape.op("GreaterOrEqual", weights, threshold),
            tape.op("Less", rank, self._column(self._top_k)),
        )
        weights = tape.op("Mul", weights, tape.op("Cast", keep, to=ir.DataType.FLOAT))
        total = tape.op("ReduceSum", weights, column, keepdims=1)
        before = tape.op("CumSum", weights, tape.constant(1), exclusive=1)
        nucleus = tape.op("Mul", total, self._column(self._top_p))
        inside = tape.op("Less", before, nucleus)
        weights = tape.op("Mul", weights, tape.op("Cast", inside, to=ir.DataType.FLOAT))
        probabilities = tape.op("Div", weights, tape.op("ReduceSum", weights, column, keepdims=1))

        uniform = tape.op("Unsqueeze", tape.op("Gather", self._uniforms, place, axis=1), column)
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

    def _column(self, each: ir.Value) -> ir.Value:
        """[R] as [R, 1], made once for all slots."""
        if each not in self._columns:
            self._columns[each] = self._tape.outside("Unsqueeze", each, self._tape.constant([1]))
        return self._columns[each]
