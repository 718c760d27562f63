"""Exported golden targets against the numbers of the reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
from artifacts import GOLDEN_NAMES, golden_arrays, golden_taps
from engines import Driver, ids, open_runner
from engines import KeepingSink as Sink

from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_and_features(golden_artifacts, name):
    golden = golden_arrays(name)
    tokens = [*golden["prompt"].tolist(), *golden["greedy"].tolist()]
    stage = OnnxRuntimeVerifier(golden_artifacts[name], threads=1)
    assert stage.artifact.target_layer_ids == golden_taps(name)
    stage.allocate(1, 128, ())
    output = stage.step(StepBatch.pack([Segment(0, 0, tokens, 0)]))
    assert output.logits.shape == golden["target_logits"].shape
    np.testing.assert_allclose(output.logits, golden["target_logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(output.features, golden["target_features"], rtol=0, atol=TOLERANCE)
    assert (output.argmax == golden["target_logits"].argmax(axis=1)).all()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_features_are_those_of_the_tapped_layers_and_no_others(golden_artifacts, name):
    """The negative control: features of neighbouring taps must not match."""
    golden = golden_arrays(name)
    hidden = golden["target_features"].shape[1] // len(golden_taps(name))
    parts = np.split(golden["target_features"], len(golden_taps(name)), axis=1)
    assert parts[0].shape[1] == hidden
    for left in range(len(parts)):
        for right in range(left):
            assert np.abs(parts[left] - parts[right]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("chunk", [256, 4])
def test_greedy_tokens_through_the_engine(golden_artifacts, name, chunk):
    golden = golden_arrays(name)
    driver = Driver(golden_artifacts[name], prefill_chunk=chunk)
    wanted = ids(*golden["prompt"].tolist(), max_tokens=len(golden["greedy"]), ignore_eos=True)
    (sink,) = driver.run(wanted)
    assert sink.tokens() == golden["greedy"].tolist()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_greedy_tokens_through_the_runner_with_company(golden_artifacts, name):
    golden = golden_arrays(name)
    prompt, greedy = golden["prompt"].tolist(), golden["greedy"].tolist()
    runner = open_runner(golden_artifacts[name], threads=2)
    try:
        sinks = [Sink() for _ in range(6)]
        for index, sink in enumerate(sinks):
            # Every other request is a different one, so that batches are mixed.
            tokens = prompt if index % 2 == 0 else [1 + index, *prompt]
            runner.submit(ids(*tokens, max_tokens=len(greedy), ignore_eos=True), sink)
        for sink in sinks[::2]:
            assert sink.wait().tokens() == greedy
        for sink in sinks[1::2]:
            assert sink.wait().tokens() != greedy
    finally:
        runner.stop()
