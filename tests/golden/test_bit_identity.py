"""A position's logits are the same bits whatever the chunking, batch, slot, capacity or number of threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from artifacts import GOLDEN, GOLDEN_NAMES, export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import plain_logits, scheduled_logits

from dspark_backend.stages.batch import RowMove, Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Unlike ==: tells -0 from 0 and takes equal NaNs for equal."""
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


class Subject:
    """Sessions with 1 and 2 threads, and the plain logits of a few sequences."""

    def __init__(self, artifact: Path, lengths: tuple[int, ...]) -> None:
        self.stages = {threads: OnnxRuntimeVerifier(artifact, threads) for threads in (1, 2)}
        vocab = self.stages[1].artifact.vocab_size
        rng = np.random.default_rng(5)
        self.sequences = [rng.integers(0, vocab, length).tolist() for length in lengths]
        self.expected = [plain_logits(self.stages[1], sequence) for sequence in self.sequences]

    def check(self, seed: int, longest_chunk: int = 12) -> None:
        rng = np.random.default_rng(seed)
        threads = int(rng.integers(1, 3))
        members = rng.permutation(len(self.sequences))[: int(rng.integers(1, len(self.sequences) + 1))]
        chosen = [self.sequences[member] for member in members]
        logits = scheduled_logits(self.stages[threads], chosen, rng, longest_chunk)
        for member, found in zip(members, logits, strict=True):
            assert same_bits(found, self.expected[member]), f"seed {seed}: sequence {member}, {threads} threads"


@pytest.fixture(scope="module", params=[*GOLDEN_NAMES, "float16", "bfloat16", "int8"])
def tiny(request, golden_artifacts, tmp_path_factory) -> Subject:
    """Every golden target in float32, and one of them in each other precision that the exporter writes."""
    if request.param in GOLDEN_NAMES:
        artifact = golden_artifacts[request.param]
    else:
        target = GOLDEN / "qwen3_vanilla" / "target"
        artifact = export(target, tmp_path_factory.mktemp(request.param) / "artifact", dtype=request.param)
    return Subject(artifact, (150, 61, 40, 17, 9, 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_any_schedule(tiny, seed):
    tiny.check(seed)


def test_prompt_at_once(tiny):
    for threads, stage in tiny.stages.items():
        for sequence, expected in zip(tiny.sequences, tiny.expected, strict=True):
            stage.allocate(1, 256, ())
            found = stage.step(StepBatch.pack([Segment(0, 0, sequence, 0)])).logits
            assert same_bits(found, expected), threads


def test_rows_copied_to_another_slot(tiny):
    stage, sequence = tiny.stages[2], tiny.sequences[1]
    stage.allocate(3, 128, ())
    stage.step(StepBatch.pack([Segment(0, 0, sequence[:30], 30)]))
    stage.copy_rows(RowMove(0, 2, 30))
    stage.allocate(5, 384, [RowMove(2, 4, 30)])
    found = stage.step(StepBatch.pack([Segment(4, 30, sequence[30:], 0)])).logits
    assert same_bits(found, tiny.expected[1][30:])


def test_other_contexts_change_bits(tiny):
    """The negative control: what must matter does, so that equality above means something."""
    stage, sequence = tiny.stages[1], list(tiny.sequences[1])
    sequence[0] = (sequence[0] + 1) % stage.artifact.vocab_size
    stage.allocate(1, 128, ())
    found = stage.step(StepBatch.pack([Segment(0, 0, sequence, 0)])).logits
    assert all(not same_bits(row, other) for row, other in zip(found, tiny.expected[1], strict=True))


def test_stale_rows_of_the_own_past_would_change_bits(tiny):
    """The negative control of recomputed positions: a wrong token that is *not* overwritten shows."""
    stage, sequence = tiny.stages[1], tiny.sequences[2]
    stage.allocate(1, 128, ())
    stage.step(StepBatch.pack([Segment(0, 0, [*sequence[:10], (sequence[10] + 1) % 300], 11)]))
    found = stage.step(StepBatch.pack([Segment(0, 11, sequence[11:], 0)])).logits
    assert not same_bits(found[0], tiny.expected[2][11])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["smollm2_artifact", "smollm2_int8"])
def test_smollm2(precision, request):
    subject = Subject(request.getfixturevalue(precision), (150, 40, 17))
    for seed in range(3):
        subject.check(seed, longest_chunk=24)
