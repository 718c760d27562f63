"""Tensors of the wire to requests, and results to tensors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dspark_backend.delta import Delta, FinishReason, Usage
from dspark_backend.errors import InvalidRequest
from dspark_backend.request import GenerationRequest, SamplingParams
from dspark_backend.wire import NUMPY_DTYPES, Collector, parse_request, render
from dspark_client.schema import INPUTS, OUTPUTS

TEXT = {"text_input": np.array([b"hi"], dtype=np.object_)}

# Input -> (a value for its tensor, where it must end up, the value there).
ROWS = {
    "text_input": ([b"h\xc3\xa9"], "text", "h\u00e9"),
    "input_ids": ([5, 7], "input_ids", (5, 7)),
    "messages": ([b"[]"], "messages", "[]"),
    "max_tokens": ([9], "max_tokens", 9),
    "min_tokens": ([3], "min_tokens", 3),
    "stream": ([True], "stream", True),
    "exclude_input_in_output": ([False], "echo", True),
    "temperature": ([0.5], "sampling.temperature", 0.5),
    "top_k": ([40], "sampling.top_k", 40),
    "top_p": ([0.25], "sampling.top_p", 0.25),
    "min_p": ([0.125], "sampling.min_p", 0.125),
    "repetition_penalty": ([1.5], "sampling.repetition_penalty", 1.5),
    "presence_penalty": ([-0.5], "sampling.presence_penalty", -0.5),
    "frequency_penalty": ([0.75], "sampling.frequency_penalty", 0.75),
    "seed": ([2**64 - 1], "sampling.seed", 2**64 - 1),
    "stop_words": ([b"a", b"b"], "stop_words", ("a", "b")),
    "bad_words": ([b"c"], "bad_words", ("c",)),
    "ignore_eos": ([True], "ignore_eos", True),
    "return_log_probs": ([True], "log_probs", True),
    "num_return_sequences": ([4], "num_sequences", 4),
    "priority": ([-2], "priority", -2),
    "timeout_ms": ([1500], "timeout_ms", 1500),
    "draft_policy": ([b"fixed:3"], "draft_policy", "fixed:3"),
    "max_draft_tokens": ([2], "max_draft_tokens", 2),
}
PROMPTS = ("text_input", "input_ids", "messages")


def tensor(name: str, values: list) -> np.ndarray:
    spec = next(spec for spec in INPUTS if spec.name == name)
    return np.array(values, dtype=NUMPY_DTYPES[spec.datatype])


class TestParse:
    def test_the_table_is_complete(self):
        assert set(ROWS) == {spec.name for spec in INPUTS}

    @pytest.mark.parametrize("name", ROWS)
    def test_every_input(self, name):
        values, place, expected = ROWS[name]
        arrays = {name: tensor(name, values)} | ({} if name in PROMPTS else TEXT)
        parsed = parse_request(arrays)
        for part in place.split("."):
            parsed = getattr(parsed, part)
        assert parsed == expected and type(parsed) is type(expected)

    def test_every_field_of_a_request_has_an_input(self):
        places = {place for _, place, _ in ROWS.values()}
        sampling = {f"sampling.{field.name}" for field in dataclasses.fields(SamplingParams)}
        assert places == sampling | {f.name for f in dataclasses.fields(GenerationRequest)} - {"sampling"}

    def test_absent_inputs_take_the_defaults(self):
        assert parse_request(TEXT) == GenerationRequest(text="hi", stream=False)

    def test_scalars_of_shape_one_by_one(self):
        assert parse_request(TEXT | {"max_tokens": np.array([[4]], dtype=np.int32)}).max_tokens == 4

    def test_fixed_width_bytes(self):
        assert parse_request({"text_input": np.array([b"hi"])}).text == "hi"

    @pytest.mark.parametrize("spec", INPUTS, ids=lambda spec: spec.name)
    def test_wrong_dtype(self, spec):
        wrong = np.array([1], dtype=np.int16)
        with pytest.raises(InvalidRequest, match=f"{spec.name}: expected {spec.datatype}, got an array of int16"):
            parse_request(TEXT | {spec.name: wrong})

    @pytest.mark.parametrize("spec", [spec for spec in INPUTS if spec.scalar], ids=lambda spec: spec.name)
    @pytest.mark.parametrize("count", [0, 2])
    def test_wrong_count(self, spec, count):
        array = tensor(spec.name, ROWS[spec.name][0] * count)
        with pytest.raises(InvalidRequest, match=rf"{spec.name}: expected one value \(shape \[1\]\), got shape"):
            parse_request(TEXT | {spec.name: array})

    @pytest.mark.parametrize("spec", [spec for spec in INPUTS if not spec.scalar], ids=lambda spec: spec.name)
    def test_wrong_rank(self, spec):
        array = tensor(spec.name, ROWS[spec.name][0]).reshape(1, -1)
        with pytest.raises(InvalidRequest, match=rf"{spec.name}: expected a list \(shape \[n\]\), got shape \[1"):
            parse_request(TEXT | {spec.name: array})

    @pytest.mark.parametrize("name", ["text_input", "messages", "stop_words", "bad_words", "draft_policy"])
    def test_invalid_utf8(self, name):
        arrays = ({} if name in PROMPTS else TEXT) | {name: tensor(name, [b"ab\xff"])}
        with pytest.raises(InvalidRequest, match=f"{name}: expected UTF-8 text, got invalid bytes at offset 2"):
            parse_request(arrays)

    def test_bytes_that_are_none(self):
        with pytest.raises(InvalidRequest, match="text_input: expected UTF-8 text, got int"):
            parse_request({"text_input": np.array([5], dtype=np.object_)})

    def test_unknown_input(self):
        with pytest.raises(InvalidRequest, match="temprature: unknown input; expected one of text_input"):
            parse_request(TEXT | {"temprature": np.array([1.0], dtype=np.float32)})

    def test_no_prompt_and_two_prompts(self):
        with pytest.raises(InvalidRequest, match="exactly one of text_input, input_ids and messages, got none"):
            parse_request({})
        with pytest.raises(InvalidRequest, match="got text_input and input_ids"):
            parse_request(TEXT | {"input_ids": tensor("input_ids", [1])})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("max_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("num_return_sequences", 0), ("timeout_ms", 0)],
    )
    def test_values_out_of_range(self, name, value):
        with pytest.raises(InvalidRequest, match=f"{name}: expected"):
            parse_request(TEXT | {name: tensor(name, [value])})


def usage(output_tokens: int = 2, **changes) -> Usage:
    values = {field.name: number for number, field in enumerate(dataclasses.fields(Usage), start=10)}
    return Usage(**values | {"output_tokens": output_tokens} | changes)


def final(index: int, text: str, *tokens: int, log_probs: tuple[float, ...] = ()) -> Delta:
    return Delta(index, text, tokens, log_probs, FinishReason.STOP, usage(len(tokens)))


class TestRender:
    def check_types(self, tensors: dict) -> None:
        specs = {spec.name: spec for spec in OUTPUTS}
        for name, array in tensors.items():
            spec = specs[name]
            assert array.dtype == np.dtype(NUMPY_DTYPES[spec.datatype]), name
            assert array.ndim == 1 and (not spec.scalar or array.shape == (1,)), name

    def test_a_piece_of_a_stream(self):
        tensors = render([Delta(2, "h\u00e9", (5, 6), ())])
        self.check_types(tensors)
        assert {name: array.tolist() for name, array in tensors.items()} == {
            "text_output": ["h\u00e9".encode()],
            "output_ids": [5, 6],
            "sequence_index": [2],
        }

    def test_empty_text_and_no_tokens(self):
        tensors = render([Delta(0, "", (), ())])
        self.check_types(tensors)
        assert tensors["text_output"].tolist() == [b""] and tensors["output_ids"].shape == (0,)

    def test_the_last_piece(self):
        tensors = render([final(0, "x", 5)])
        self.check_types(tensors)
        assert {spec.name for spec in OUTPUTS} - tensors.keys() == {"output_log_probs"}
        assert tensors["finish_reason"].tolist() == [b"stop"]
        one = usage(1)
        assert tensors["num_input_tokens"].tolist() == [one.input_tokens]
        assert tensors["num_output_tokens"].tolist() == [1]
        assert tensors["num_rounds"].tolist() == [one.rounds]
        assert tensors["total_draft_tokens"].tolist() == [one.draft_tokens]
        assert tensors["total_accepted_draft_tokens"].tolist() == [one.accepted_draft_tokens]
        assert tensors["acceptance_rate"].tolist() == [np.float32(one.acceptance_rate)]
        assert tensors["last_token_time_ns"].tolist() == [one.last_token_ns]

    def test_all_at_once(self):
        tensors = render([final(0, "ab", 5, 6, log_probs=(-1.0, -2.0)), final(1, "c", 7, log_probs=(-3.0,))])
        self.check_types(tensors)
        assert tensors["text_output"].tolist() == [b"ab", b"c"]
        assert tensors["output_ids"].tolist() == [5, 6, 7]
        assert tensors["num_output_tokens"].tolist() == [2, 1]
        assert tensors["output_log_probs"].tolist() == [-1, -2, -3]
        assert tensors["num_input_tokens"].shape == (1,) and tensors["finish_reason"].shape == (2,)

    def test_nanoseconds_survive(self):
        now = 1_800_000_000_123_456_789
        tensors = render([Delta(0, "", (1,), (), FinishReason.LENGTH, usage(arrival_ns=now))])
        assert tensors["arrival_time_ns"].tolist() == [now]
        assert tensors["finish_reason"].tolist() == [b"length"]


class TestCollector:
    def test_streaming_passes_on(self):
        collector, delta = Collector(stream=True), final(0, "x", 1)
        assert collector.take(delta, False) == [delta]
        assert collector.take(delta, True) == [delta]

    def test_one_response_in_order_of_sequence(self):
        collector = Collector(stream=False)
        deltas = [final(index, str(index), index) for index in (2, 0, 1)]
        assert collector.take(deltas[0], False) == [] == collector.take(deltas[1], False)
        assert [delta.sequence_index for delta in collector.take(deltas[2], True)] == [0, 1, 2]
