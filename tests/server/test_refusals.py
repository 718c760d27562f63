"""Refusals that depend on the moment: deadlines, running and waiting, and a full queue."""

from __future__ import annotations

import threading
import time

import pytest
from raw_calls import RawClient, Refused
from refusals import ANSWER, IDS, refusal
from server_state import until

from dspark_client.errors import DeadlineError, ServerUnavailableError, error_from_message

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

ENDLESS = {"max_tokens": 504}


@pytest.fixture
def client(tiny_server):
    """A client of the tiny model; afterwards the server must answer as ever."""
    with RawClient(tiny_server.grpc_url) as made:
        yield made
        assert made.generate(IDS | {"max_tokens": 4})["output_ids"] == ANSWER


def test_a_deadline_while_running(client):
    message = refusal(client, IDS | ENDLESS | {"timeout_ms": 40}, DeadlineError)
    assert message == "[DEADLINE_EXCEEDED] timeout_ms: the deadline of 40 ms passed"


def test_a_deadline_after_some_pieces(client):
    ids: list[int] = []
    with pytest.raises(Refused, match=r"^\[DEADLINE_EXCEEDED\] timeout_ms: the deadline of 150 ms passed$"):
        for piece in client.stream(IDS | ENDLESS | {"timeout_ms": 150, "stream": True}):
            ids += piece["output_ids"]
    assert ids[:4] == ANSWER


@pytest.fixture(scope="module")
def narrow_server(make_server):
    """One slot and one place in the queue."""
    made = make_server("tiny", parameters={"max_slots": "1", "max_queue_size": "1"})
    yield made
    made.stop()


class Occupant:
    """A request that holds the server's only slot until it is let go."""

    def __init__(self, client: RawClient) -> None:
        self.call = client.open_stream(IDS | ENDLESS | {"stream": True})
        assert not next(self.call).error_message
        # Read on, or flow control would stop nothing but this reader.
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        try:
            for _ in self.call:
                pass
        except Exception:
            return

    def leave(self) -> None:
        self.call.cancel()
        self.reader.join(10)


def test_queue_full_and_a_deadline_in_the_queue(narrow_server):
    with RawClient(narrow_server.grpc_url) as client:
        refused: list[str] = []
        late: list[str] = []
        for _ in range(8):
            # An occupant generates its 504 tokens in some tenths of a second: the queue must fill in that time.
            occupant = Occupant(client)
            queued = client.open_stream(IDS | ENDLESS | {"timeout_ms": 50})
            time.sleep(0.01)
            try:
                list(client.stream(IDS | {"max_tokens": 1}))
            except Refused as error:
                refused.append(error.message)
            late.extend(response.error_message for response in queued)
            occupant.leave()
        assert refused, "the queue never was full"
        assert set(refused) == {
            "[UNAVAILABLE] queue: expected fewer than 1 waiting requests (max_queue_size), there are 1; try again later"
        }
        assert type(error_from_message(refused[0])) is ServerUnavailableError
        assert set(late) - {""} == {"[DEADLINE_EXCEEDED] timeout_ms: the deadline of 50 ms passed"}
        until(lambda: not refuses(client), 5, "the queue has room again")
        assert client.generate(IDS | {"max_tokens": 4})["output_ids"] == ANSWER


def refuses(client: RawClient) -> bool:
    try:
        client.generate(IDS | {"max_tokens": 1})
    except Refused:
        return True
    return False
