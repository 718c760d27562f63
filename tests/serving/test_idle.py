from __future__ import annotations

from dspark_backend.serving.idle import requests_in_flight

from .conftest import Endpoint

BUSY = b"""\
# TYPE dspark_num_requests_running gauge
dspark_num_requests_running{model="dspark",version="1"} 3.000000
dspark_num_requests_running{model="other",version="1"} 1
dspark_num_requests_waiting{model="dspark",version="1"} 2
nv_inference_count{model="dspark"} 77
"""


def test_running_and_waiting_requests_of_all_models_are_added(endpoint: Endpoint) -> None:
    url, text = endpoint
    text[0] = BUSY
    assert requests_in_flight(url) == 6
    text[0] = b"dspark_num_requests_running 0\ndspark_num_requests_waiting 0\n"
    assert requests_in_flight(url) == 0


def test_unknown_is_not_zero(endpoint: Endpoint) -> None:
    url, text = endpoint
    text[0] = b"nv_inference_count 7\n"
    assert requests_in_flight(url) is None
    assert requests_in_flight("http://127.0.0.1:1/metrics") is None
