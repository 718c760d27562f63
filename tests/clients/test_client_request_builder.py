"""The request builder writes every row of the schema, with its datatype and shape, or says why it cannot."""

import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor

from dspark_client.errors import InvalidRequestError
from dspark_client.options import GenerateOptions, Message
from dspark_client.request_builder import Prompt, build_request, encode
from dspark_client.schema import INPUTS, TensorSpec

PROMPTS = {
    "text_input": "Grüß 你好 \U0001f600\0",
    "input_ids": [1, 2, 2**31 - 1],
    "messages": [Message("system", "be brief"), {"role": "user", "content": "grüß", "name": "x"}],
}
OPTIONS = GenerateOptions(
    max_tokens=7,
    min_tokens=2,
    temperature=0.75,
    top_k=-1,
    top_p=0.5,
    min_p=0.25,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.125,
    seed=2**64 - 1,
    stop_words=["\n\n", "fin"],
    bad_words=("bäd",),
    ignore_eos=True,
    return_log_probs=True,
    num_return_sequences=3,
    exclude_input_in_output=False,
    priority=-2,
    timeout_ms=1500,
    draft_policy="fixed:3",
    max_draft_tokens=2,
)


def built(prompt, options=OPTIONS, **settings):
    return build_request(Prompt(**prompt), options, stream=True, model_name="dspark", **settings)


def tensors(request):
    """What a server reads: name -> (datatype, shape, values)."""
    numpy_types = {"BOOL": bool, "INT32": "<i4", "UINT64": "<u8", "FP32": "<f4"}
    read = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            values = [item.decode() for item in deserialize_bytes_tensor(raw)]
        else:
            values = np.frombuffer(raw, numpy_types[tensor.datatype]).tolist()
        read[tensor.name] = (tensor.datatype, list(tensor.shape), values)
    return read


def nested(depth):
    inner = []
    for _ in range(depth):
        inner = [inner]
    return inner


def spec_of(name):
    return next(spec for spec in INPUTS if spec.name == name)


def test_every_row_of_the_schema_can_be_sent():
    sent = {}
    for name, value in PROMPTS.items():
        sent |= tensors(built({name: value}))
    assert set(sent) == {spec.name for spec in INPUTS}
    for spec in INPUTS:
        datatype, shape, values = sent[spec.name]
        assert datatype == spec.datatype
        assert shape == ([1] if spec.scalar else [len(values)])
        if spec.name in {field.name for field in fields(OPTIONS)}:
            expected = getattr(OPTIONS, spec.name)
            assert values == (list(expected) if not spec.scalar else [expected])
    assert sent["text_input"][2] == [PROMPTS["text_input"]]
    assert sent["input_ids"][2] == PROMPTS["input_ids"]
    assert json.loads(sent["messages"][2][0]) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "grüß", "name": "x"},
    ]


def test_every_option_is_a_row_of_the_schema():
    assert {field.name for field in fields(GenerateOptions)} <= {spec.name for spec in INPUTS}


def test_unset_options_are_not_sent():
    options = GenerateOptions(stop_words=[], bad_words=())
    assert set(tensors(built({"text_input": ""}, options))) == {"text_input", "stream"}


def test_model_version_and_request_id_are_in_the_message():
    request = built({"text_input": "x"}, model_version="3", request_id="abc")
    assert (request.model_name, request.model_version, request.id) == ("dspark", "3", "abc")


def test_numpy_values_are_taken():
    options = GenerateOptions(max_tokens=np.int64(4), temperature=np.float32(0.5), ignore_eos=np.bool_(True))
    sent = tensors(built({"input_ids": np.arange(3, dtype=np.uint16)}, options))
    assert sent["input_ids"] == ("INT32", [3], [0, 1, 2])
    assert sent["max_tokens"][2] == [4]
    assert sent["temperature"][2] == [0.5]
    assert sent["ignore_eos"][2] == [True]


@pytest.mark.parametrize(
    ("given_prompts", "named"),
    [({}, "none"), ({"text_input": "a", "input_ids": [1]}, "text_input and input_ids"), (PROMPTS, "and messages")],
)
def test_exactly_one_prompt(given_prompts, named):
    with pytest.raises(InvalidRequestError, match=rf"exactly one.*{named}"):
        Prompt(**given_prompts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 2**31),
        ("max_tokens", -(2**31) - 1),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", "4"),
        ("seed", 2**64),
        ("seed", -1),
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("temperature", True),
        ("ignore_eos", 1),
        ("stop_words", "\n"),
        ("stop_words", [1]),
        ("stop_words", 3),
        ("bad_words", [b"x"]),
        ("bad_words", ["\ud800"]),
    ],
)
def test_what_a_tensor_cannot_hold_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError, match=rf"^{name}: expected"):
        built({"text_input": "x"}, GenerateOptions(**{name: value}))


@pytest.mark.parametrize(
    "prompt",
    [
        {"text_input": 3},
        {"text_input": "\udfff"},
        {"input_ids": []},
        {"input_ids": "12"},
        {"input_ids": [1.5]},
        {"input_ids": [2**31]},
        {"input_ids": np.array([[1, 2], [3, 4]])},
        {"input_ids": np.array(3)},
        {"input_ids": [np.array([1, 2])]},
        {"messages": "hi"},
        {"messages": {"role": "user", "content": "hi"}},
        {"messages": [3]},
        {"messages": [{"role": "user", "content": object()}]},
        {"messages": [{"role": "user", "content": nested(5000)}]},
    ],
)
def test_a_prompt_that_cannot_be_sent_is_refused_by_name(prompt):
    with pytest.raises(InvalidRequestError, match=rf"^{next(iter(prompt))}: expected"):
        built(prompt)


@pytest.mark.parametrize("name", ["model_version", "request_id"])
@pytest.mark.parametrize("value", [1, "\ud800"])
def test_names_are_text(name, value):
    with pytest.raises(InvalidRequestError, match=rf"^{name}: expected"):
        built({"text_input": "x"}, **{name: value})


def test_what_only_the_server_can_judge_is_sent():
    sent = tensors(built({"text_input": ""}, GenerateOptions(temperature=-1.0, top_p=7.0, max_tokens=-5)))
    assert (sent["temperature"][2], sent["top_p"][2], sent["max_tokens"][2]) == ([-1.0], [7.0], [-5])


@given(st.integers())
def test_an_integer_is_sent_unchanged_or_refused(value):
    spec = TensorSpec("x", "INT32", (1,), "")
    if -(2**31) <= value < 2**31:
        assert encode(spec, value).tolist() == [value]
    else:
        with pytest.raises(InvalidRequestError):
            encode(spec, value)


@given(st.lists(st.text(), min_size=1))
def test_text_comes_back_as_it_was(words):
    assert tensors(built({"text_input": "x"}, GenerateOptions(stop_words=words)))["stop_words"][2] == words


def test_datatype_of_every_row_is_known():
    samples = {"BYTES": "a", "BOOL": True, "INT32": 1, "INT64": 1, "UINT64": 1, "FP32": 1.0}
    for spec in INPUTS:
        value = samples[spec.datatype]
        assert encode(spec, value if spec.scalar else [value]).shape == (1,)
    assert spec_of("seed").datatype == "UINT64"
