from __future__ import annotations

from dspark_backend.metrics import EngineMetrics
from dspark_backend.serving.options import Ports
from dspark_backend.serving.progress import COUNTERS, work_done

from .conftest import Endpoint

TEXT = b"""\
# HELP dspark_steps_total Verification steps.
dspark_steps_total{model="dspark",version="1"} 7
dspark_generation_tokens_total{model="dspark",version="1"} 1.5e+01
dspark_generation_tokens_total{model="other",version="1"} 1000
dspark_num_requests_running{model="dspark",version="1"} 3
"""


def test_steps_and_tokens_of_the_model_are_added(endpoint: Endpoint) -> None:
    url, text = endpoint
    text[0] = TEXT
    assert work_done(url, "dspark") == 22.0
    assert work_done(url, "missing") is None


def test_what_speaks_no_http_tells_nothing() -> None:
    assert work_done(f"http://127.0.0.1:{Ports.free().http}/metrics", "dspark") is None
    assert work_done("no url", "dspark") is None


def test_the_engine_has_these_counters() -> None:
    assert set(COUNTERS) <= {name for name, _ in EngineMetrics().items()}
