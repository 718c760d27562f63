"""The ``verifier`` model of the repository: scoring with the target alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
from raw_calls import RawClient, Refused

from dspark_backend.stages.batch import Segment, StepBatch
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

VOCABULARY, CONTEXT = 384, 512


@pytest.fixture(scope="module")
def alone(make_server):
    """A server that was told to load the verifier and nothing else."""
    made = make_server("tiny", models=("verifier",), wait=False)
    made.process.wait_until_serving(None, 60)
    yield made
    made.stop()


@pytest.fixture
def client(alone):
    with RawClient(alone.grpc_url) as made:
        yield made


@pytest.fixture(scope="module")
def stage(alone):
    """The same artifact, run here."""
    made = OnnxRuntimeVerifier(alone.repository / "verifier" / "1")
    made.allocate(1, CONTEXT, ())
    yield made
    made.close()


def prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCABULARY, length).astype(np.int32)


def test_it_is_loaded_alone(alone, client):
    assert client.stub.ModelReady(model_ready("verifier")).ready
    assert not client.stub.ModelReady(model_ready("dspark")).ready


def model_ready(name: str):
    from tritonclient.grpc import service_pb2

    return service_pb2.ModelReadyRequest(name=name)


# 256 is where the score is computed in a second chunk.
@pytest.mark.parametrize("length", [1, 2, 40, 256, 257, CONTEXT])
def test_it_says_what_the_stage_says(client, stage, length):
    ids = prompt(length)
    said = client.infer({"input_ids": ids}, "verifier", ("argmax", "log_probs", "logits"))
    output = stage.step(StepBatch.pack([Segment(0, 0, ids.tolist(), 0)]))
    assert {name: (array.shape, array.dtype) for name, array in said.items()} == {
        "argmax": ((length,), np.int32),
        "log_probs": ((length,), np.float32),
        "logits": ((length, VOCABULARY), np.float32),
    }
    np.testing.assert_array_equal(said["argmax"], output.argmax)
    np.testing.assert_array_equal(said["logits"], output.logits)
    wide = output.logits.astype(np.float64)
    normal = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    expected = np.concatenate([[0.0], normal[np.arange(length - 1), ids[1:]]])
    np.testing.assert_allclose(said["log_probs"], expected, rtol=1e-6, atol=1e-6)


def test_only_what_is_asked_for_is_sent(client):
    said = client.infer({"input_ids": prompt(9)}, "verifier", ("argmax", "log_probs"))
    assert set(said) == {"argmax", "log_probs"}
    assert set(client.infer({"input_ids": prompt(9)}, "verifier", ("log_probs",))) == {"log_probs"}


def test_its_argmax_is_what_dspark_generates(client, tiny_server):
    with RawClient(tiny_server.grpc_url) as dspark:
        generated = dspark.generate({"input_ids": [1, 2, 3], "max_tokens": 12})["output_ids"]
    text = np.array([1, 2, 3, *generated], np.int32)
    said = client.infer({"input_ids": text}, "verifier", ("argmax",))["argmax"]
    np.testing.assert_array_equal(said[2:-1], generated)


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (np.zeros(0, np.int32), f"input_ids: expected 1 to {CONTEXT} tokens, got 0"),
        (np.zeros(CONTEXT + 1, np.int32), f"input_ids: expected 1 to {CONTEXT} tokens, got {CONTEXT + 1}"),
        (np.array([1, VOCABULARY], np.int32), f"ids from 0 to {VOCABULARY - 1}, got {VOCABULARY}"),
        (np.array([-1], np.int32), f"ids from 0 to {VOCABULARY - 1}, got -1"),
    ],
)
def test_what_cannot_be_scored_is_refused(client, ids, wanted):
    with pytest.raises(Refused) as refused:
        client.infer({"input_ids": ids}, "verifier", ("argmax",))
    assert refused.value.code == "INVALID_ARGUMENT"
    assert refused.value.message.startswith("[INVALID_ARGUMENT] input_ids: ")
    assert wanted in refused.value.message
    assert client.infer({"input_ids": prompt(3)}, "verifier", ("argmax",))["argmax"].shape == (3,)


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        ({}, "expected 1 inputs but got 0"),
        ({"input_ids": np.zeros(3, np.int64)}, "data-type is 'INT64', but model 'verifier' expects 'INT32'"),
        ({"input_ids": np.zeros((1, 3), np.int32)}, "unexpected shape for input 'input_ids' for model 'verifier'"),
    ],
)
def test_what_triton_itself_refuses(client, inputs, wanted):
    with pytest.raises(Refused, match=wanted) as refused:
        client.infer(inputs, "verifier")
    assert refused.value.code == "INVALID_ARGUMENT"


def test_scores_do_not_depend_on_what_came_before(client):
    first = client.infer({"input_ids": prompt(50)}, "verifier", ("logits",))["logits"]
    client.infer({"input_ids": prompt(400)}, "verifier", ("argmax",))
    np.testing.assert_array_equal(client.infer({"input_ids": prompt(50)}, "verifier", ("logits",))["logits"], first)
    begin = time.monotonic()
    client.infer({"input_ids": prompt(CONTEXT)}, "verifier", ("argmax",))
    assert time.monotonic() - begin < 5.0
