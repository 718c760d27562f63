"""Drafting and scheduling of a round: which requests draft, what, and how deep each is verified.

Also feeds the drafter's context: target features of committed positions wait here, per sequence, until a block is
drafted behind them or enough of them have gathered.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_backend.calibration import Calibration
from dspark_backend.cost import CostModel, FloatArray
from dspark_backend.cost_cache import CostCache
from dspark_backend.draft import Draft
from dspark_backend.draft_state import Survival, extended
from dspark_backend.drafting_choice import Chosen, DraftingChoice
from dspark_backend.metrics import EngineMetrics
from dspark_backend.online_calibration import OnlineCalibration
from dspark_backend.rng import Purpose
from dspark_backend.round_cost import RoundCost
from dspark_backend.round_plan import Block, Round
from dspark_backend.scheduling import DepthPolicy, DraftRound
from dspark_backend.sequence import SequenceState
from dspark_backend.stages.batch import IntArray
from dspark_backend.stages.draft_batch import ContextRows, DraftBatch, DraftOutput, DraftSampling
from dspark_backend.stages.protocol import DrafterStage
from dspark_backend.stages.rows import Rows, joined

_FLUSH_ROWS = 256
"""Context rows of a sequence that may wait; more go to the drafter at once, so that memory stays flat."""
_SETTLE_EVERY = 16
"""Blocks that are compared with their predictions at once: it is a number for a dashboard, and costs 0.1 ms."""
_MEMORY = 0.8
"""Weight of the past in running means of survival."""
_DOUBT = 0.5
"""Weight of everybody's mean beside the first curve of a sequence."""


@dataclass(frozen=True)
class Drafting:
    """What speculation needs beside the verifier."""

    drafter: DrafterStage
    calibration: Calibration
    cost: CostModel
    cost_cache: CostCache | None = None
    """Where ``cost`` is kept: told to forget it when it proves wrong."""


class DraftingFailed(Exception):
    """The drafter raised, which is the cause."""

    def __init__(self, sequences: Sequence[SequenceState]) -> None:
        super().__init__()
        self.sequences = tuple(sequences)
        """Whose drafts were being made: all that drafted in the round."""


class Speculator:
    """Owns the drafter's side of the engine. Single-threaded, as the engine is."""

    def __init__(self, drafting: Drafting, metrics: EngineMetrics) -> None:
        self._drafter = drafter = drafting.drafter
        self._calibration = drafting.calibration
        self._cost = RoundCost(drafting.cost, drafter.artifact.block_size, drafting.cost_cache)
        self._metrics = metrics
        self._prior: Survival | None = None
        self._online = OnlineCalibration(drafter.artifact.block_size)
        self._judged: list[tuple[Survival, int, int]] = []
        """What was predicted for a block, how many of its drafts were judged, how many stood."""
        self._choice = DraftingChoice(self._cost, drafter.artifact.block_size)
        self._drawing: tuple[list[int], DraftSampling] | None = None
        """The sequences that drafted last, and how: mostly the same ones as in the round before."""
        self.block_size = drafter.artifact.block_size
        self._even: Survival = 0.5 ** np.arange(1, self.block_size + 1)

    def feed(self, sequence: SequenceState, features: Rows) -> None:
        """Take the features [n, F] of positions that were just committed to the target's cache: a view will do."""
        if not sequence.prepared.policy.drafts:
            return
        sequence.draft.pending.append(features.copy())
        if sequence.draft.pending_rows > _FLUSH_ROWS:
            self.flush(sequence)

    def flush(self, sequence: SequenceState) -> None:
        """Bring the drafter's cache up to date with what is committed: others can copy only rows that are there."""
        if sequence.draft.pending:
            self._drafter.commit_context(self._take_context([sequence]))

    def keep(self, sequence: SequenceState) -> None:
        """Before a sequence ends: ``flush``, where more waits than the rows of its last round."""
        if sequence.draft.pending_rows > self.block_size + 1:
            self.flush(sequence)

    def plan(self, running: Sequence[SequenceState], capacity: int) -> Round:
        """Draft where it pays, and choose depths. The drafter's cache is brought up to date for those that draft.

        Raises:
            DraftingFailed: the drafter raised; sequences that did not draft lose nothing.
        """
        count = len(running)
        blocks = [Block()] * count
        limits = self._limits(running)
        choice = self._choice.choose(running, limits, capacity, self._prior)
        chosen = choice.rows
        self._count_idle(running, limits, set(chosen))
        if chosen:
            drafting = [running[row] for row in chosen]
            adaptive = np.array([sequence.prepared.policy.adaptive for sequence in drafting])
            limits = np.where(adaptive, np.minimum(limits[chosen], choice.depth), limits[chosen])
            widths = np.array([self._width(sequence, choice) for sequence in drafting])
            greedy = np.array([sequence.prepared.request.sampling.greedy for sequence in drafting])
            try:
                drafts, survival = self._draft(drafting, widths, greedy, capacity)
            except Exception as error:  # whatever the runtime raises
                raise DraftingFailed(drafting) from error
            seconds = self._seconds(widths, limits, count, capacity)
            depths = self._depths(drafting, survival, limits, count, seconds)
            for place, row in enumerate(chosen):
                blocks[row] = drafts[place].block(int(depths[place]), survival[place], bool(greedy[place]))
            self._remember(drafting, survival)
        depths_of_all = [len(block.drafts.tokens) for block in blocks]
        predicted = self._cost.verify_seconds(count, sum(depths_of_all), capacity, max(depths_of_all, default=0))
        return Round(blocks, predicted, capacity)

    def learn(self, sequence: SequenceState, block: Block, accepted: int, judged: int) -> None:
        """What became of a block that was drafted: the first ``judged`` of its drafts were held against the target."""
        verified = len(block.drafts.tokens)
        state = sequence.draft
        state.drafted_tokens += block.drafted
        state.verified_tokens += verified
        state.accepted_tokens += accepted
        self._metrics.count_block(block.drafted, verified, accepted)
        if block.survival is not None:
            self._judged.append((block.survival, judged, accepted))

    def settle(self) -> None:
        """Call after a step: now and then, what was predicted for the blocks is compared with what came."""
        if len(self._judged) < _SETTLE_EVERY:
            return
        survival, judged, accepted = zip(*self._judged, strict=True)
        self._online.update(np.array(survival), np.array(judged), np.array(accepted))
        self._judged.clear()
        self._metrics.spec_decode_calibration_error.value = self._online.error

    def track(self, planned: Round, seconds: float) -> None:
        """What a verification step really took, and what the scheduler asked of it."""
        drafted = sum(block.drafted for block in planned.blocks)
        depths = planned.depths
        verified = sum(depths)
        self._metrics.spec_decode_verify_budget.value = verified
        self._metrics.spec_decode_trim_ratio.value = 1.0 - verified / drafted if drafted else 0.0
        self._metrics.predicted_step_seconds_total.add(planned.predicted_seconds)
        if planned.predicted_seconds:
            self._cost.observe_verify(len(depths), verified, planned.capacity, max(depths), seconds)
        self._metrics.cost_model_error.value = self._cost.mean_relative_error

    def _count_idle(self, running: Sequence[SequenceState], limits: IntArray, chosen: set[int]) -> None:
        skipped = 0
        for row, sequence in enumerate(running):
            sequence.draft.idle_rounds = 0 if row in chosen else sequence.draft.idle_rounds + 1
            skipped += row not in chosen and limits[row] > 0
        self._metrics.spec_decode_drafter_skips_total.add(skipped)

    def _limits(self, running: Sequence[SequenceState]) -> IntArray:
        """Most drafts worth verifying: the last token of an answer needs no draft behind it."""
        limits = []
        for sequence in running:
            left = sequence.prepared.max_tokens - sequence.context.output_length - 1
            limits.append(max(0, min(left, self._deepest(sequence))))
        return np.array(limits, dtype=np.int64)

    def _deepest(self, sequence: SequenceState) -> int:
        """Most drafts that are ever verified of a sequence, by its policy and its own cap."""
        cap = sequence.prepared.request.max_draft_tokens
        return min(sequence.prepared.policy.deepest, self.block_size, self.block_size if cap is None else cap)

    def _width(self, sequence: SequenceState, choice: Chosen) -> int:
        """Slots to draft for a sequence."""
        if not self._drafter.artifact.variable_width:
            return self.block_size
        if sequence.prepared.policy.adaptive:
            return choice.width
        # Not fewer towards the answer's end, nor as others of the batch want it: a seed's drafts stay the same.
        return self._deepest(sequence)

    def _draft(
        self, drafting: Sequence[SequenceState], widths: IntArray, greedy: NDArray[np.bool_], capacity: int
    ) -> tuple[list[Draft], FloatArray]:
        """One drafting round for each width. The drafts and their survival curves [n, g], in the sequences' order.

        Beyond a block's end curves go on as the sequence's earlier ones did.
        """
        found: dict[int, Draft] = {}
        survival = np.array([self._known(sequence) for sequence in drafting])
        for width in sorted(set(widths.tolist())):
            rows = np.flatnonzero(widths == width)
            output = self._draft_alike([drafting[row] for row in rows.tolist()], width, capacity)
            found |= {row: Draft(output, place) for place, row in enumerate(rows.tolist())}
            curves = self._calibration.survival(output.confidence_logits, ~greedy[rows])
            survival[rows] = extended(curves, survival[rows])
        return [found[row] for row in range(len(drafting))], survival

    def _draft_alike(self, drafting: Sequence[SequenceState], width: int, capacity: int) -> DraftOutput:
        uniforms = np.zeros((len(drafting), width), dtype=np.float32)
        for row, sequence in enumerate(drafting):
            if not sequence.prepared.request.sampling.greedy:
                uniforms[row] = sequence.rng.uniforms(Purpose.DRAFT, width, np.float32)
        sampling = self._draft_sampling(drafting)
        context = self._take_context(drafting)
        begin = time.perf_counter()
        output = self._drafter.draft(
            DraftBatch(
                context=context,
                anchors=np.array([sequence.anchor for sequence in drafting], dtype=np.int64),
                slots=np.array([sequence.held_slot.index for sequence in drafting], dtype=np.int64),
                starts=np.array([sequence.held_slot.length for sequence in drafting], dtype=np.int64),
                uniforms=uniforms,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
        )
        seconds = time.perf_counter() - begin
        self._metrics.spec_decode_draft_seconds_total.add(seconds)
        if context.num_rows <= len(drafting) * (self.block_size + 1):
            # More are prompts, whose rows come once whatever is drafted: drafting would look dearer than it is.
            self._cost.observe_draft(len(drafting), capacity, width, seconds)
        return output

    def _known(self, sequence: SequenceState) -> Survival:
        """A mean curve of the sequence; of everybody before it has drafted."""
        return sequence.draft.expected if sequence.draft.expected is not None else self._usual

    @property
    def _usual(self) -> Survival:
        """A mean curve of everybody; at the very start an even chance."""
        return self._prior if self._prior is not None else self._even

    def _seconds(self, widths: IntArray, limits: IntArray, count: int, capacity: int) -> FloatArray:
        """Of the whole round by drafts verified, as the policies want it."""
        seconds = self._cost.step_seconds(count, int(limits.sum()), capacity, int(limits.max()))
        for width in sorted(set(widths.tolist())):
            seconds += self._cost.draft_seconds(int((widths == width).sum()), capacity, width)
        return seconds

    def _draft_sampling(self, drafting: Sequence[SequenceState]) -> DraftSampling:
        numbers = [sequence.number for sequence in drafting]
        if self._drawing is None or self._drawing[0] != numbers:
            params = [sequence.prepared.request.sampling for sequence in drafting]
            self._drawing = (numbers, DraftSampling.of(params, self._drafter.artifact.num_candidates))
        return self._drawing[1]

    def _take_context(self, sequences: Sequence[SequenceState]) -> ContextRows:
        """All waiting rows of some sequences; they count as cached from here on."""
        features: list[Rows] = []
        positions, slots = [], []
        for sequence in sequences:
            state, slot = sequence.draft, sequence.held_slot
            rows = state.pending_rows
            features += state.pending
            positions.append(np.arange(state.context_length, state.context_length + rows, dtype=np.int64))
            slots.append(np.full(rows, slot.index, dtype=np.int64))
            state.pending = []
            state.context_length += rows
            slot.context_length = state.context_length
        if not features:
            return ContextRows.none(self._drafter.artifact.feature_size)
        return ContextRows(joined(features), np.concatenate(positions), np.concatenate(slots))

    def _depths(
        self, drafting: Sequence[SequenceState], survival: FloatArray, limits: IntArray, count: int, seconds: FloatArray
    ) -> IntArray:
        """Depth of every drafting sequence, int64 [n]. Policies that look at nobody else go first."""
        lagged = np.array([self._lagged(sequence) for sequence in drafting])
        groups: dict[DepthPolicy, list[int]] = {}
        for row, sequence in enumerate(drafting):
            groups.setdefault(sequence.prepared.policy, []).append(row)
        if len(groups) == 1:
            (policy,) = groups
            return policy.depths(DraftRound(survival, lagged, limits, seconds, count))
        depths = np.zeros(len(drafting), dtype=np.int64)
        spent, gained = 0, 0.0
        for policy, rows in sorted(groups.items(), key=lambda item: item[0].adaptive):
            draft_round = DraftRound(survival[rows], lagged[rows], limits[rows], seconds[spent:], count + gained)
            depths[rows] = policy.depths(draft_round)
            spent += int(depths[rows].sum())
            gained += sum(float(survival[row, : depths[row]].sum()) for row in rows)
        return depths

    def _lagged(self, sequence: SequenceState) -> Survival:
        """Survival of two rounds ago; before that the mean over everybody."""
        recent = sequence.draft.recent
        return recent[-2] if len(recent) >= 2 else self._usual

    def _remember(self, drafting: Sequence[SequenceState], survival: FloatArray) -> None:
        for sequence, curve in zip(drafting, survival, strict=True):
            state = sequence.draft
            state.recent.append(curve)
            # A first curve alone says little: those that look best by chance would be taken.
            state.expected = _blend(self._known(sequence), curve, _MEMORY if state.expected is not None else _DOUBT)
            self._prior = curve if self._prior is None else _blend(self._prior, curve, _MEMORY)


def _blend(past: Survival, now: Survival, memory: float) -> Survival:
    return memory * past + (1 - memory) * now
