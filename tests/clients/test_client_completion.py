"""Responses become pieces, and pieces whole answers."""

import numpy as np
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from dspark_client.completion import Completion, Piece, Usage, collect, pieces_of
from dspark_client.errors import ServerError
from dspark_client.schema import OUTPUTS

DTYPES = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


def response(**values):
    """A response as Triton writes it."""
    message = service_pb2.ModelInferResponse(model_name="dspark")
    for name, value in values.items():
        spec = next(spec for spec in OUTPUTS if spec.name == name)
        message.outputs.add(name=name, datatype=spec.datatype, shape=[len(value)])
        if spec.datatype == "BYTES":
            packed = serialize_byte_tensor(np.array([text.encode() for text in value], dtype=object))
            raw = packed.item() if packed.size else b""
        else:
            raw = np.array(value, dtype=DTYPES[spec.datatype]).tobytes()
        message.raw_output_contents.append(raw)
    return message


def ends(*counts, **others):
    """The tensors of sequences' last response."""
    rows = range(len(counts))
    return {
        "finish_reason": ["stop" if row == 0 else "length" for row in rows],
        "num_input_tokens": [5],
        "num_output_tokens": list(counts),
        "acceptance_rate": [0.5 for _ in rows],
        "total_accepted_draft_tokens": [2 + row for row in rows],
        "total_draft_tokens": [8 for _ in rows],
        "total_verified_draft_tokens": [4 for _ in rows],
        "num_rounds": [3 for _ in rows],
        "arrival_time_ns": [1_000_000_000],
        "first_scheduled_time_ns": [1_000_000_500 for _ in rows],
        "first_token_time_ns": [1_250_000_000 for _ in rows],
        "last_token_time_ns": [2_250_000_000 for _ in rows],
    } | others


def test_a_piece_in_the_middle():
    message = response(text_output=["grüß "], output_ids=[4, 5], sequence_index=[2], output_log_probs=[-0.5, -1.0])
    assert pieces_of(message) == (Piece(2, "grüß ", (4, 5), (-0.5, -1.0)),)


def test_a_piece_without_tokens():
    assert pieces_of(response(text_output=["held back"], output_ids=[], sequence_index=[0])) == (
        Piece(0, "held back", ()),
    )


def test_a_last_piece_counts_the_whole_sequence_but_holds_its_own_tokens():
    (piece,) = pieces_of(response(text_output=["."], output_ids=[9], sequence_index=[1], **ends(30)))
    assert piece.token_ids == (9,)
    assert piece.finish_reason == "stop"
    assert piece.usage == Usage(5, 30, 8, 4, 2, 3, 1_000_000_000, 1_000_000_500, 1_250_000_000, 2_250_000_000)


def test_one_response_of_several_sequences_is_split_by_their_counts():
    message = response(
        text_output=["a", "b", "c"],
        output_ids=[1, 2, 3, 4, 5, 6],
        output_log_probs=[-1, -2, -3, -4, -5, -6],
        sequence_index=[0, 1, 2],
        **ends(3, 0, 3),
    )
    completions = collect(pieces_of(message))
    assert [c.token_ids for c in completions] == [(1, 2, 3), (), (4, 5, 6)]
    assert [c.log_probs for c in completions] == [(-1, -2, -3), (), (-4, -5, -6)]
    assert [c.text for c in completions] == ["a", "b", "c"]
    assert [c.usage.accepted_draft_tokens for c in completions] == [2, 3, 4]
    assert [c.finish_reason for c in completions] == ["stop", "length", "length"]


def test_interleaved_pieces_are_joined_by_sequence():
    usage = Usage(1, 2, 0, 0, 0, 2, 0, 0, 0, 0)
    pieces = [
        Piece(1, "x", (7,), (-1.0,)),
        Piece(0, "a", (1,), (-2.0,)),
        Piece(1, "y", (8,), (-3.0,), "stop", usage),
        Piece(0, "b", (2,), (-4.0,), "length", usage),
    ]
    assert collect(pieces) == [
        Completion(0, "ab", (1, 2), (-2.0, -4.0), "length", usage),
        Completion(1, "xy", (7, 8), (-1.0, -3.0), "stop", usage),
    ]


def test_a_sequence_without_an_end_is_an_error():
    with pytest.raises(ServerError, match="last piece of sequence 0"):
        collect([Piece(0, "a", (1,))])


def test_derived_values():
    usage = Usage(5, 11, 8, 4, 2, 3, 1_000_000_000, 1_000_000_500, 1_250_000_000, 2_250_000_000)
    assert usage.acceptance_rate == 0.5
    assert usage.time_to_first_token_s == 0.25
    assert usage.tokens_per_second == 10.0
    single = Usage(5, 1, 0, 0, 0, 0, 0, 0, 7, 7)
    assert (single.acceptance_rate, single.tokens_per_second) == (0.0, 0.0)


@pytest.mark.parametrize(
    "message",
    [
        response(text_output=["a"], output_ids=[1]),
        response(text_output=["a"], sequence_index=[0]),
        response(text_output=["a", "b"], output_ids=[1, 2, 3], sequence_index=[0, 1], **ends(1, 1)),
        response(text_output=["a", "b"], output_ids=[1, 2], sequence_index=[0, 1]),
        response(text_output=[], output_ids=[1], sequence_index=[0]),
        response(text_output=["a"], output_ids=[1], sequence_index=[0], finish_reason=["stop"]),
    ],
)
def test_a_response_that_breaks_the_schema_is_an_error(message):
    with pytest.raises(ServerError, match="cannot read"):
        pieces_of(message)
