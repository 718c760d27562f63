"""The ``drafter`` model of the repository: one block of drafts behind given features."""

from __future__ import annotations

import numpy as np
import pytest
from artifacts import golden_arrays
from drafters import export_golden_drafter, golden_rounds
from raw_calls import RawClient, Refused
from tritonclient.grpc import service_pb2

from dspark_backend.drafting_alone import DraftQuery, draft_alone
from dspark_backend.request import SamplingParams
from dspark_backend.stages.onnxruntime_drafter import OnnxRuntimeDrafter

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

NAME = "qwen3_vanilla"


@pytest.fixture(scope="module")
def drafter(golden_artifacts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter") / "artifact"
    export_golden_drafter(NAME, golden_artifacts[NAME], folder)
    return folder


@pytest.fixture(scope="module")
def alone(make_server, golden_artifacts, drafter):
    """A server that was told to load the drafter and nothing else."""
    made = make_server(golden_artifacts[NAME], drafter=drafter, models=("drafter",), wait=False)
    made.process.wait_until_serving(None, 60)
    yield made
    made.stop()


@pytest.fixture
def client(alone):
    with RawClient(alone.grpc_url) as made:
        yield made


@pytest.fixture(scope="module")
def stage(golden_artifacts, drafter):
    """The same artifact, run here."""
    made = OnnxRuntimeDrafter(drafter, golden_artifacts[NAME])
    yield made
    made.close()


def is_ready(client: RawClient, name: str) -> bool:
    return client.stub.ModelReady(service_pb2.ModelReadyRequest(name=name)).ready


def test_it_is_loaded_alone(client):
    assert [is_ready(client, name) for name in ("drafter", "verifier", "dspark")] == [True, False, False]


def test_it_is_left_out_where_nothing_was_exported(tiny_server):
    with RawClient(tiny_server.grpc_url) as client:
        assert [is_ready(client, name) for name in ("drafter", "verifier", "dspark")] == [False, True, True]


def test_every_golden_round(client):
    features = golden_arrays(NAME)["target_features"]
    for round_ in golden_rounds(NAME):
        said = client.infer({"features": features[: round_.start], "anchor": round_.anchor}, "drafter")
        assert {name: (array.shape, array.dtype) for name, array in said.items()} == {
            "tokens": ((7,), np.int32),
            "confidence": ((7,), np.float32),
            "candidates": ((7, 64), np.int32),
            "probabilities": ((7, 64), np.float32),
        }
        assert said["tokens"].tolist() == round_.draft_tokens.tolist()
        expected = 1 / (1 + np.exp(-round_.confidence_logits.astype(np.float64)))
        np.testing.assert_allclose(said["confidence"], expected, rtol=0, atol=1e-4)


def test_draws_are_those_of_the_stage(client, stage):
    features = golden_arrays(NAME)["target_features"][:33]
    options = {"temperature": np.float32(1.5), "top_k": 20, "top_p": np.float32(0.9)}
    blocks = set()
    for seed in range(8):
        sampling = SamplingParams(temperature=1.5, top_k=20, top_p=float(options["top_p"]), seed=seed)
        inputs = {name: np.atleast_1d(np.asarray(value)) for name, value in options.items()}
        inputs["top_k"] = inputs["top_k"].astype(np.int32)
        said = client.infer(
            {"features": features, "anchor": 5, "seed": np.array([seed], np.uint64)} | inputs, "drafter"
        )
        expected = draft_alone(stage, DraftQuery(features, 5, sampling))
        np.testing.assert_array_equal(said["tokens"], expected.tokens)
        np.testing.assert_array_equal(said["candidates"], expected.candidates)
        np.testing.assert_array_equal(said["probabilities"], expected.probabilities)
        blocks.add(tuple(said["tokens"].tolist()))
    assert len(blocks) > 4


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"features": np.zeros((0, 192), np.float32)}, "features: expected 1 to 511 rows, got 0"),
        ({"features": np.zeros((512, 192), np.float32)}, "features: expected 1 to 511 rows, got 512"),
        ({"features": np.zeros((2, 64), np.float32)}, "rows of 192 numbers (3 layers of 64), got 64"),
        ({"features": np.full((2, 192), np.nan, np.float32)}, "features: expected finite numbers"),
        ({"anchor": 384}, "anchor: expected an id from 0 to 383, got 384"),
        ({"temperature": -1.0}, "temperature: expected 0 (greedy) to 100, got -1.0"),
        ({"top_p": 0.0}, "top_p: expected a number in (0, 1], got 0.0"),
    ],
)
def test_what_cannot_be_drafted_is_refused(client, changes, wanted):
    good = {"features": np.ones((2, 192), np.float32), "anchor": 3}
    with pytest.raises(Refused) as refused:
        client.infer(good | changes, "drafter")
    assert refused.value.code == "INVALID_ARGUMENT"
    assert refused.value.message.startswith("[INVALID_ARGUMENT] ")
    assert wanted in refused.value.message
    assert client.infer(good, "drafter")["tokens"].shape == (7,)
