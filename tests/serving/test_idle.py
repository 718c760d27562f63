from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from dspark_backend.serving.idle import requests_in_flight

BUSY = b"""\
# TYPE dspark_num_requests_running gauge
dspark_num_requests_running{model="dspark",version="1"} 3.000000
dspark_num_requests_running{model="other",version="1"} 1
dspark_num_requests_waiting{model="dspark",version="1"} 2
nv_inference_count{model="dspark"} 77
"""


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[bytes]]]:
    """A metrics address, and the list whose only entry it answers."""
    text = [b""]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text[0])

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics", text
        server.shutdown()


def test_running_and_waiting_requests_of_all_models_are_added(endpoint: tuple[str, list[bytes]]) -> None:
    url, text = endpoint
    text[0] = BUSY
    assert requests_in_flight(url) == 6
    text[0] = b"dspark_num_requests_running 0\ndspark_num_requests_waiting 0\n"
    assert requests_in_flight(url) == 0


def test_unknown_is_not_zero(endpoint: tuple[str, list[bytes]]) -> None:
    url, text = endpoint
    text[0] = b"nv_inference_count 7\n"
    assert requests_in_flight(url) is None
    assert requests_in_flight("http://127.0.0.1:1/metrics") is None
