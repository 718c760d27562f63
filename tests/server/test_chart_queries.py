"""The chart's queries, asked of a real Prometheus that scrapes a real server under load of all policies."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from artifacts import CHECKOUT
from helm_tools import helm_binary
from raw_calls import RawClient

from dspark_backend.serving.options import Ports

sys.path.append(str(CHECKOUT / "deploy" / "helm"))

import queries

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (apt install prometheus)"
    ),
]

POLICIES = ("off", "fixed:1", "fixed:64", "threshold:0.2", "causal", "lagged")
SCRAPE_SECS = 0.25
LOAD_SECS = 1.5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[queries.Query]:
    monkeypatch.setenv("HELM", str(helm_binary()))
    return list(queries.queries())


def load(url: str, policy: str, seed: int, end: float) -> None:
    """Requests with this policy, one after another."""
    rng = np.random.default_rng(seed)
    with RawClient(url) as client:
        while time.monotonic() < end:
            prompt = rng.integers(0, 384, 20).astype(np.int32)
            client.generate({"input_ids": prompt, "max_tokens": 30, "draft_policy": policy})


def test_every_query_has_an_answer(speculating: Any, asked: list[queries.Query]) -> None:
    assert len({query.place.partition(":")[0] for query in asked}) == 4
    metrics = speculating.metrics_url.removeprefix("http://").removesuffix("/metrics")
    with queries.prometheus(metrics, Ports.free().http, SCRAPE_SECS) as server:
        end = time.monotonic() + LOAD_SECS
        threads = [
            threading.Thread(target=load, args=(speculating.grpc_url, policy, seed, end))
            for seed, policy in enumerate(POLICIES)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = [queries.ask(server, query) for query in asked]
        missing = queries.ask(server, queries.Query("no such", "rate(dspark_no_such_total[1m])"))
        refused = queries.ask(server, queries.Query("no query", "sum("))
    assert [str(answer) for answer in answers if not answer.fine] == []
    assert not missing.fine and not refused.fine and "parse error" in refused.refusal
