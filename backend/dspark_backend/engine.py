"""The engine: continuous batching and speculation over the stages. Single-threaded; ``runner`` gives it a thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from dspark_backend.config import EngineConfig
from dspark_backend.errors import DSparkError, InternalError, NotFinite
from dspark_backend.kv_cache import KvCache
from dspark_backend.metrics import EngineMetrics
from dspark_backend.prompt_chunks import chunk_budget, neighbours
from dspark_backend.ranked import ranking_temperature
from dspark_backend.roster import SEE_LOG, Roster
from dspark_backend.round_plan import Block, Round
from dspark_backend.sequence import RequestState, SequenceState
from dspark_backend.speculation import Drafting, DraftingFailed, Speculator
from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.protocol import VerifierStage
from dspark_backend.stages.rows import Rows
from dspark_backend.step_result import StepResult
from dspark_backend.telemetry import RoundObserver, RoundRecord
from dspark_backend.tokenizer import Tokenizer
from dspark_backend.verification import TargetRows, take_tokens

logger = logging.getLogger(__name__)

_MIB = 2**20


class Engine:
    """Moves all requests on, one step at a time.

    Raises:
        DSparkError: the settings do not fit the stages (a cache budget below one sequence).
    """

    def __init__(
        self,
        stage: VerifierStage,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        drafting: Drafting | None = None,
        observer: RoundObserver | None = None,
    ) -> None:
        self._stage = stage
        self._config = config
        self._observer = observer
        drafter = drafting.drafter if drafting else None
        self.metrics = EngineMetrics(drafter.artifact.block_size if drafter else 0)
        budget = config.kv_budget_mib * _MIB
        self.cache = KvCache(
            stage, config.max_slots, budget, config.max_context, drafter, keep_rows=config.prefix_reuse
        )
        self.roster = Roster(self.cache, tokenizer, self.metrics)
        self._speculator: Speculator | None = None
        if drafting:
            self._speculator = Speculator(drafting, self.metrics)

    @property
    def idle(self) -> bool:
        return not self.roster.requests

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot, or some of whose sequences do."""
        return len({sequence.state for sequence in self.roster.waiting})

    @property
    def num_free(self) -> int:
        """Slots that nobody holds and nobody waits for."""
        roster = self.roster
        taken = len(roster.waiting) + len(roster.prefilling) + len(roster.verifying)
        return max(0, self._config.max_slots - taken)

    def submit(self, state: RequestState) -> None:
        """Queue a request. Its results come through its sink during later steps."""
        self.roster.join(state)

    def step(self) -> None:
        """One round: every running sequence gets at least one token, and some prompts a chunk further."""
        self.roster.drop_ended()
        self.roster.admit()
        self._prefill()
        running = list(self.roster.verifying)
        if running:
            self._verify(running, self._plan(running))
        self.roster.publish()

    def fail_all(self, error: DSparkError) -> None:
        """End every request with an error."""
        self.roster.fail_all(error)
        self.roster.publish()

    def recover(self) -> None:
        """After a step that raised: end every request, and start over with an empty cache."""
        try:
            self.roster.fail_all(InternalError(SEE_LOG))
        finally:
            self.roster.prefilling.clear()
            self.roster.verifying.clear()
            self.cache.reset()
            self.roster.publish()

    def _prefill(self) -> None:
        """Put the next chunk of prompts into the cache; a prompt's last token gives the first one of the answer."""
        config, roster = self._config, self.roster
        waiting = len({sequence.state for sequence in roster.prefilling})
        budget = chunk_budget(waiting, bool(roster.verifying), config.prefill_chunk, config.prefill_chunk_busy)
        pairs: list[tuple[SequenceState, Sequence[int]]] = []
        leading = {sequence.state for sequence in roster.prefilling if sequence.index == 0}
        for sequence in list(roster.prefilling):
            if budget <= 0:
                break
            if sequence.slot is None:
                continue  # another sequence of its request failed just now
            if not sequence.prefill_started:
                if config.prefix_reuse and sequence.index > 0 and sequence.state in leading:
                    continue  # one step later the prompt's rows are there to be copied
                self._start_prefill(sequence)
                if sequence.slot is None:
                    continue  # its request failed with a sibling
            start = sequence.held_slot.length
            piece = sequence.prepared.prompt_ids[start : start + budget]
            pairs.append((sequence, piece))
            budget -= len(piece)
        # Where the drafter failed, some of those that were chosen before may be gone.
        pairs = [pair for pair in pairs if pair[0].slot is not None]
        if not pairs:
            return
        # Once for all runs, and before it is asked which are neighbours: it may move sequences to other slots.
        self._make_room(pairs)
        slots = [sequence.held_slot.index for sequence, _ in pairs]
        for run in neighbours(slots, [len(piece) for _, piece in pairs]):
            self._prefill_run([pairs[place] for place in run if pairs[place][0].slot is not None])

    def _prefill_run(self, pairs: Sequence[tuple[SequenceState, Sequence[int]]]) -> None:
        """One run of the verifier over pieces of prompts."""
        ran = self._run([sequence for sequence, _ in pairs], [piece for _, piece in pairs])
        if ran is None:
            return
        self.metrics.prefill_seconds_total.add(ran.seconds)
        for row, (sequence, piece) in enumerate(pairs):
            if sequence.slot is None:
                continue  # another sequence of its request failed just now
            self._commit(sequence, piece, ran.features[row])
            if sequence.slot is not None and ran.targets[row].argmax:
                self.roster.promote(sequence)
                if self._take(sequence, Block(), ran.targets[row]) is not None:
                    self._emit(sequence)

    def _start_prefill(self, sequence: SequenceState) -> None:
        """Late, so that siblings of one request find the first one's rows in the cache."""
        sequence.prefill_started = True
        slot, prompt = sequence.held_slot, sequence.prepared.prompt_ids
        if not self._config.prefix_reuse:
            slot.truncate(0)
            return
        drafts = self._speculator is not None and sequence.prepared.policy.drafts
        # The last token must run again: its logits are the answer's first.
        most = len(prompt) - 1
        if drafts and (lacking := self.cache.lacks_context(slot, prompt, most)):
            for other in [*self.roster.prefilling, *self.roster.verifying]:
                if other.slot is lacking:
                    self._flush(other)
            if sequence.slot is None:
                return
        hit = self.cache.reuse_prefix(slot, prompt, most, with_context=drafts)
        sequence.reused_rows = hit
        sequence.draft.context_length = slot.context_length
        self.metrics.prefix_cache_hit_tokens_total.add(hit)

    def _plan(self, running: Sequence[SequenceState]) -> Round:
        """Drafts and depths of this round; anchors alone without a drafter, or where it failed: those for which it
        drafted then failed, too."""
        plain = Round([Block()] * len(running), 0.0)
        if self._speculator is None:
            return plain
        self.cache.prepare(max(sequence.held_slot.length for sequence in running) + 1)
        try:
            return self._speculator.plan(running, self.cache.capacity)
        except DraftingFailed as failed:
            self._lose_drafter(failed.sequences, failed.__cause__ or failed)
        except Exception as error:  # a defect of ours must not end the engine
            self._lose_drafter([sequence for sequence in running if sequence.prepared.policy.drafts], error)
        return plain

    def _verify(self, running: Sequence[SequenceState], planned: Round) -> None:
        """Run the target over anchors and drafts, and take what it says."""
        pairs = [pair for pair in zip(running, planned.blocks, strict=True) if pair[0].slot is not None]
        if not pairs:
            return
        sequences = [sequence for sequence, _ in pairs]
        pieces = [(sequence.anchor, *block.drafts.tokens) for sequence, block in pairs]
        self._make_room(list(zip(sequences, pieces, strict=True)))
        ran = self._run(sequences, pieces)
        if ran is None:
            return
        self.metrics.count_step(ran.num_tokens, ran.seconds)
        if self._speculator is not None:
            self._speculator.track(planned, ran.seconds)
        if not ran.finite:
            self._clear_broken(sequences, ran)
        for row, (sequence, block) in enumerate(pairs):
            if sequence.slot is None:
                continue  # another sequence of its request failed just now
            sequence.rounds += 1
            anchor, before = sequence.anchor, sequence.context.output_length
            accepted = self._take(sequence, block, ran.targets[row])
            if accepted is None:
                continue
            self._commit(sequence, (anchor, *block.drafts.tokens[:accepted])[: ran.sound[row]], ran.features[row])
            if sequence.slot is None:
                continue  # its context could not be committed
            if self._speculator is not None and block.drafted:
                # Where a draft ended the sequence, nothing was said of those behind it: no token follows that draft.
                ended = sequence.context.output_length - before == accepted
                judged = accepted if ended else len(block.drafts.tokens)
                self._speculator.learn(sequence, block, accepted, judged)
                self._observe(sequence, block, accepted, judged)
            self._emit(sequence)
        if self._speculator is not None:
            self._speculator.settle()

    def _run(self, chosen: Sequence[SequenceState], pieces: Sequence[Sequence[int]]) -> StepResult | None:
        """One step of the verifier over the next tokens of some sequences, for which there is room.

        The last token of a prompt and every later one is asked what follows it. None where there is nothing to run or
        it failed (its requests then failed, too).
        """
        if not chosen:
            return None
        segments = []
        for sequence, piece in zip(chosen, pieces, strict=True):
            slot = sequence.held_slot
            silent = min(len(piece), max(0, len(sequence.prepared.prompt_ids) - 1 - slot.length))
            temperature = ranking_temperature(sequence.prepared.request)
            segments.append(Segment(slot.index, slot.length, piece, silent, temperature))
        batch = StepBatch.pack(segments)
        begin = time.perf_counter()
        try:
            output = self._stage.step(batch)
        except Exception as error:  # whatever the runtime raises must not end the engine
            logger.exception("a step of the verifier failed")
            for sequence in chosen:
                self.roster.fail(sequence.state, InternalError(f"the model failed: {error}"))
            return None
        return StepResult.of(batch, output, time.perf_counter() - begin)

    def _clear_broken(self, chosen: Sequence[SequenceState], ran: StepResult) -> None:
        """Clear the rows of drafts whose logits are not finite: most fall before they are looked at, and would stay."""
        for sequence, target, sound in zip(chosen, ran.targets, ran.sound, strict=True):
            if sound < len(target.top_logit):
                self.cache.scrub(sequence.held_slot, sequence.held_slot.length + sound)

    def _make_room(self, pairs: Sequence[tuple[SequenceState, Sequence[int]]]) -> None:
        """Bring the cache into the shape that the next tokens of these sequences want. May move them to other slots."""
        self.cache.prepare(max(sequence.held_slot.length + len(piece) for sequence, piece in pairs))

    def _take(self, sequence: SequenceState, block: Block, target: TargetRows) -> int | None:
        """Append the target's tokens to a sequence. Returns how many drafts stood; None where the request failed."""
        try:
            return take_tokens(sequence, block.drafts, target)
        except NotFinite as error:
            # Its rows hold what made the logits so, and must not be reused.
            self.cache.scrub(sequence.held_slot)
            self.roster.fail(sequence.state, error)
        except DSparkError as error:
            self.roster.fail(sequence.state, error)
        except Exception:  # a defect of ours must cost one request, not the engine
            logger.exception("a request failed on an internal error")
            self.roster.fail(sequence.state, InternalError(SEE_LOG))
        return None

    def _commit(self, sequence: SequenceState, token_ids: Sequence[int], features: Rows) -> None:
        """Tokens of a step are part of the sequence now: in the target's cache, and for the drafter.

        ``features`` [n or more, F] are those of the step.
        """
        sequence.held_slot.commit(token_ids)
        if self._speculator is None:
            return
        try:
            self._speculator.feed(sequence, features[: len(token_ids)])
        except Exception as error:  # whatever the runtime raises must not end the engine
            if sequence.finish_reason is None:
                self._lose_drafter([sequence], error)
            else:
                self._forgo_context(sequence)

    def _emit(self, sequence: SequenceState) -> None:
        """Send what is new of a sequence. Of one that is finished, what may be of use to others stays in the cache."""
        if self._speculator is not None and sequence.finish_reason is not None and self._config.prefix_reuse:
            try:
                self._speculator.keep(sequence)
            except Exception:  # whatever the runtime raises must not end the engine
                self._forgo_context(sequence)
        self.roster.emit(sequence)

    def _forgo_context(self, sequence: SequenceState) -> None:
        """The drafter raised, but the answer is complete and not lost. Call while the exception is handled."""
        logger.exception("the drafter failed; rows of a finished answer cannot be used again")
        sequence.held_slot.context_length = 0

    def _flush(self, sequence: SequenceState) -> None:
        """Rows of a sequence that wait for the drafter go there now, so that others can start from them."""
        if self._speculator is None:
            return
        try:
            self._speculator.flush(sequence)
        except Exception as error:  # whatever the runtime raises must not end the engine
            self._lose_drafter([sequence], error)

    def _lose_drafter(self, sequences: Sequence[SequenceState], error: BaseException) -> None:
        """The drafter raised: what it had in hand fails. Call while the exception is handled."""
        logger.exception("the drafter failed")
        # Rows that were on their way may not have arrived: nobody may reuse them. Of all first: with a sequence its
        # siblings lose their slots.
        for sequence in sequences:
            if sequence.slot is not None:
                sequence.slot.context_length = 0
        for sequence in sequences:
            if sequence.slot is not None:
                self.roster.fail(sequence.state, InternalError(f"the drafter failed: {error}"))

    def _observe(self, sequence: SequenceState, block: Block, accepted: int, judged: int) -> None:
        if self._observer is None or block.confidence_logits is None:
            return
        self._observer(
            RoundRecord(
                confidence_logits=block.confidence_logits.copy(),
                sampled=not sequence.prepared.request.sampling.greedy,
                verified=judged,
                accepted=accepted,
                request=sequence.number,
            )
        )
