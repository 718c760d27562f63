"""Prometheus' text format."""

import math

import pytest

from dspark_client.errors import InvalidRequestError, ServerConnectionError
from dspark_client.prometheus import Sample, fetch, parse

TEXT = r"""# HELP dspark_x_total things
# TYPE dspark_x_total counter
dspark_x_total{model="dspark",version="1"} 12
dspark_wait_seconds_bucket{model="dspark",le="+Inf"} 3
dspark_wait_seconds_sum 0.25 1700000000000
dspark_odd{path="a\\b\"c}\nd"} -1.5e-3
dspark_nothing NaN
nv_inference_count{model="dspark"} 4
"""


def test_samples_of_the_prefix_in_order():
    samples = list(parse(TEXT, "dspark_"))
    assert samples[:4] == [
        Sample("dspark_x_total", (("model", "dspark"), ("version", "1")), 12.0),
        Sample("dspark_wait_seconds_bucket", (("model", "dspark"), ("le", "+Inf")), 3.0),
        Sample("dspark_wait_seconds_sum", (), 0.25),
        Sample("dspark_odd", (("path", 'a\\b"c}\nd'),), -0.0015),
    ]
    assert math.isnan(samples[4].value)
    assert len(samples) == 5
    assert len(list(parse(TEXT))) == 6


def test_a_wrong_address_is_said():
    for wrong in ("ftp://host/metrics", "http://[::1/metrics"):
        with pytest.raises(InvalidRequestError, match="http://host:port"):
            fetch(wrong, "", 1.0)
    for timeout in (1.0, math.inf):
        with pytest.raises(ServerConnectionError, match="http://localhost:1/metrics"):
            fetch("localhost:1", "", timeout)
    with pytest.raises(ServerConnectionError, match="http://no host/metrics"):
        fetch("no host", "", 1.0)
