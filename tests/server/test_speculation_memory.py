"""What a server that speculates holds after many requests."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from artifacts import golden_arrays
from drafters import export_golden_drafter
from raw_calls import RawClient
from server_state import metric, stub_of, wait_idle

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(240)]

NAME = "qwen3_vanilla"
POLICIES = ("fixed:3", "causal")
TOKENS = 6


def test_memory_is_flat_over_1000_requests(make_server, golden_artifacts, tmp_path):
    """After a warm-up the model's process may grow by 2 KiB a request: 2 MiB."""
    verifier = golden_artifacts[NAME]
    export_golden_drafter(NAME, verifier, tmp_path / "drafter")
    parameters = {"cost_cache": str(tmp_path / "cost"), "profile_seconds": "2"}
    server = make_server(verifier, drafter=tmp_path / "drafter", parameters=parameters)
    golden = golden_arrays(NAME)
    inputs = {"input_ids": golden["prompt"].astype("int32"), "max_tokens": TOKENS}
    expected = golden["greedy"][:TOKENS].tolist()

    def ask(index: int) -> None:
        answer = client.generate(inputs | {"draft_policy": POLICIES[index % 2]})
        assert answer["output_ids"] == expected

    stub = stub_of(server)
    with RawClient(server.grpc_url) as client, ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(400)))
        wait_idle(server)
        before, drafts = stub.memory_info().rss, metric(server, "spec_decode_num_drafts_total")
        list(pool.map(ask, range(1000)))
        wait_idle(server)
        time.sleep(0.5)
        growth = (stub.memory_info().rss - before) / 2**20
        assert metric(server, "spec_decode_num_drafts_total") - drafts > 500
    assert growth < 2.0, f"the model's process grew by {growth:.2f} MiB over 1000 requests"
    server.stop()
