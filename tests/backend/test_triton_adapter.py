"""The adapter where Triton itself fails: no client waits for ever, and no answer with a hole looks whole."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
import triton_utils
from triton_utils import Request, Tensor

from dspark_backend.errors import InvalidRequest

OURS = ("dspark_backend.triton_adapter", "dspark_backend.triton_common")


@pytest.fixture(scope="module")
def adapter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", triton_utils.module())
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(OURS[0])
        for name in OURS:
            sys.modules.pop(name)


@pytest.fixture(scope="module")
def model(adapter, golden_artifacts, tmp_path_factory):
    parameters = {"verifier": str(golden_artifacts["qwen3_vanilla"]), "kv_budget_mib": "64", "threads": "1"}
    made = adapter.DSparkModel()
    made.initialize(
        {
            "model_config": json.dumps({"parameters": {k: {"string_value": v} for k, v in parameters.items()}}),
            "model_repository": str(tmp_path_factory.mktemp("repository")),
            "model_name": "dspark",
            "model_version": "1",
        }
    )
    yield made
    made.finalize()


def request(**inputs) -> Request:
    ids = np.array([3, 1, 4], np.int32)
    return Request(input_ids=ids, max_tokens=np.array([40], np.int32), ignore_eos=np.array([True]), **inputs)


def tokens(answered: Request) -> list[int]:
    arrays = [tensor.as_numpy() for response in answered.responses for tensor in response.tensors]
    names = [tensor.name() for response in answered.responses for tensor in response.tensors]
    return [token for name, array in zip(names, arrays, strict=True) if name == "output_ids" for token in array]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tensor", ["output_ids", "finish_reason"])
def test_a_response_that_cannot_be_made_becomes_an_error_and_the_end(model, stream, tensor, monkeypatch):
    monkeypatch.setattr(Tensor, "full", tensor)
    broken = request(stream=np.array([stream]))
    model.execute([broken])
    assert broken.ended.wait(20), "the client would wait for ever"
    error = broken.responses[-1].error
    assert error is not None and str(error).startswith("[INTERNAL]") and error.code == "INTERNAL"
    assert [response.error for response in broken.responses[:-1]] == [None] * (len(broken.responses) - 1)
    # The next one is answered whole.
    good = request(stream=np.array([stream]))
    model.execute([good])
    assert good.ended.wait(20) and good.responses[-1].error is None
    assert len(tokens(good)) == 40


def test_a_message_that_quotes_megabytes_is_cut(adapter):
    error = adapter.triton_error(InvalidRequest("name: expected an integer, got " + "9" * 10**6))
    assert str(error).startswith("[INVALID_ARGUMENT] name: expected an integer, got 99")
    assert len(str(error)) < 3000 and str(error).endswith("...")
