"""Random ways to feed the same sequences to a stage: chunks, batches, slots, capacities, recomputed positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_backend.kv_cache import capacity_for
from dspark_backend.stages.batch import FloatArray, Segment, StepBatch
from dspark_backend.stages.protocol import VerifierStage


def plain_logits(stage: VerifierStage, token_ids: Sequence[int]) -> FloatArray:
    """Logits of every position, alone in the first slot, one token a step: float32 [T, V]."""
    stage.allocate(1, capacity_for(len(token_ids)), ())
    rows = [
        stage.step(StepBatch.pack([Segment(0, at, [token], 0)])).logits[0].copy() for at, token in enumerate(token_ids)
    ]
    return np.stack(rows)


def scheduled_logits(
    stage: VerifierStage, sequences: Sequence[Sequence[int]], rng: np.random.Generator, longest_chunk: int = 12
) -> list[FloatArray]:
    """The same of several sequences, under a random schedule; the last computation of each position counts.

    Some steps go back and feed wrong tokens first, as a rejected draft would.
    """
    slots = rng.permutation(len(sequences) + int(rng.integers(0, 5)))[: len(sequences)]
    longest = max(len(sequence) for sequence in sequences)
    capacity = capacity_for(longest) + 128 * int(rng.integers(0, 6))
    stage.allocate(int(slots.max()) + 1, capacity, ())
    vocab = stage.artifact.vocab_size
    logits = [np.full((len(sequence), vocab), np.nan, dtype=np.float32) for sequence in sequences]
    done = [0] * len(sequences)
    while any(at < len(sequence) for at, sequence in zip(done, sequences, strict=True)):
        segments, members, wrong = [], [], rng.random() < 0.2
        for index in rng.permutation(len(sequences)):
            if done[index] == len(sequences[index]) or rng.random() < 0.3:
                continue
            size = int(rng.integers(1, longest_chunk + 1))
            piece = list(sequences[index][done[index] : done[index] + size])
            if wrong:
                piece = rng.integers(0, vocab, len(piece)).tolist()
            segments.append(Segment(int(slots[index]), done[index], piece, int(rng.integers(0, 2)) if wrong else 0))
            members.append(index)
        if not segments:
            continue
        batch = StepBatch.pack(segments)
        output = stage.step(batch)
        if wrong:
            continue
        for row, index in enumerate(members):
            size = len(segments[row].token_ids)
            logits[index][done[index] : done[index] + size] = output.logits[
                batch.logit_offsets[row] : batch.logit_offsets[row + 1]
            ]
            done[index] += size
    return logits
