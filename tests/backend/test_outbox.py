from __future__ import annotations

import threading

import pytest

from dspark_backend.delta import Delta, FinishReason, Usage
from dspark_backend.errors import RequestCancelled
from dspark_backend.outbox import Outbox, Parcel, coalesce

USAGE = Usage(**dict.fromkeys(Usage.__dataclass_fields__, 1))


def piece(owner: str, sequence: int, text: str, tokens: tuple[int, ...], end: bool = False, last: bool = False):
    reason, usage = (FinishReason.STOP, USAGE) if end else (None, None)
    log_probs = tuple(-float(token) for token in tokens)
    return Parcel(owner, [Delta(sequence, text, tokens, log_probs, reason, usage)], last)


def test_pieces_of_one_sequence_are_joined():
    joined = coalesce([piece("a", 0, "x", (1,)), piece("a", 0, "yz", (2, 3)), piece("a", 0, "!", (4,), True, True)])
    assert joined == [piece("a", 0, "xyz!", (1, 2, 3, 4), True, True)]


def test_sequences_and_requests_are_kept_apart():
    parcels = [piece("a", 0, "x", (1,)), piece("b", 0, "p", (7,)), piece("a", 1, "y", (2,)), piece("b", 0, "q", (8,))]
    assert coalesce(parcels) == [parcels[0], parcels[2], piece("b", 0, "pq", (7, 8))]


def test_what_is_last_of_a_request_comes_last():
    parcels = [
        piece("a", 0, "x", (1,)),
        piece("a", 1, "y", (2,)),
        piece("a", 1, "z", (3,), end=True),
        piece("a", 0, "!", (4,), end=True, last=True),
    ]
    assert coalesce(parcels) == [piece("a", 1, "yz", (2, 3), True), piece("a", 0, "x!", (1, 4), True, True)]


def test_an_error_comes_after_the_pieces_before_it():
    error = Parcel("a", RequestCancelled("gone"), True)
    parcels = [piece("a", 0, "x", (1,)), piece("a", 0, "y", (2,)), error]
    assert coalesce(parcels) == [piece("a", 0, "xy", (1, 2)), error]


def test_an_answer_of_several_sequences_at_once_is_left_alone():
    whole = Parcel("a", [piece("a", index, "x", (1,), True).result[0] for index in range(2)], True)
    assert coalesce([whole]) == [whole]


def test_it_gives_all_that_waits_and_then_waits_itself():
    outbox: Outbox[str] = Outbox()
    assert outbox.take(0.01) == []
    for index in range(100):
        outbox.put(piece("a", index % 3, "x", (index,)))
    assert [len(parcel.result[0].token_ids) for parcel in outbox.take(1.0)] == [33, 33, 34]
    threading.Timer(0.05, lambda: outbox.put(piece("b", 0, "y", (1,)))).start()
    assert outbox.take(5.0) == [piece("b", 0, "y", (1,))]
    assert not outbox.closed


@pytest.mark.parametrize("waiting", [0, 2])
def test_closing_it_gives_the_rest(waiting):
    outbox: Outbox[str] = Outbox()
    for index in range(waiting):
        outbox.put(piece("a", index, "x", (1,)))
    outbox.close()
    assert len(outbox.take(1.0)) == waiting
    assert outbox.closed
