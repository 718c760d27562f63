"""A health check must tell a server that can infer from one that only says it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from typer.testing import CliRunner

from dspark_backend.serving import cli, health
from dspark_backend.serving.options import Ports

from .conftest import Endpoint, MakeTriton
from .test_launcher import START_SECS, stubs_of


def test_nothing_there_is_said_so() -> None:
    state = health.check(f"127.0.0.1:{Ports.free().grpc}", timeout=2.0)
    assert not state.healthy and not state.alive
    assert "nothing answers" in state.reason


def steps(count: int) -> bytes:
    """Counters of the model after so many steps."""
    return f'dspark_steps_total{{model="counting",version="1"}} {count}\n'.encode()


@pytest.mark.parametrize(
    ("url", "metrics"),
    [("localhost:8001", "http://localhost:8002/metrics"), ("[::1]:9001", "http://[::1]:9002/metrics")],
)
def test_metrics_are_beside_grpc(url: str, metrics: str) -> None:
    assert health.beside(url) == metrics


@pytest.mark.server
def test_states_of_a_server(make_triton: MakeTriton, repository: Path, endpoint: Endpoint) -> None:
    server = make_triton()
    server.wait_until_serving("counting", START_SECS)
    model = repository / "counting"
    url = server.grpc_url

    assert health.check(url, "counting").healthy
    assert "dspark is not ready" in health.check(url, "dspark").reason

    (model / "refuse").write_text("[UNAVAILABLE] the queue is full")
    state = health.check(url, "counting")
    assert (state.healthy, state.alive) == (False, True), state
    (model / "refuse").write_text("something broke")
    state = health.check(url, "counting")
    assert (state.healthy, state.alive) == (False, False), state
    assert "something broke" in state.reason
    (model / "refuse").unlink()

    (model / "hang").touch()
    start = time.monotonic()
    state = health.check(url, "counting", timeout=1.0)
    assert time.monotonic() - start < 5.0
    assert not state.healthy and not state.alive and "no answer within" in state.reason
    # The counters tell a busy one from one that stands still.
    metrics_url, text = endpoint
    for counted, alive, words in (
        ([steps(5), steps(9)], True, "4 steps and tokens were made meanwhile"),
        ([steps(9)], False, "its counters stand still"),
        ([b"nv_inference_count 3"], False, "has no counters of it"),
    ):
        text[:] = counted
        state = health.check(url, "counting", 0.5, metrics_url)
        assert (state.healthy, state.alive) == (False, alive) and words in state.reason, state
    text[:] = [steps(5), steps(9)]
    state = health.wait(url, "counting", 0.5, 60.0, metrics_url, live=True)
    assert state.alive and not state.healthy, state
    (model / "hang").unlink()
    assert health.wait(url, "counting", patience=10.0).healthy

    (stub,) = stubs_of(server.pid)
    os.kill(stub, signal.SIGKILL)
    with triton.InferenceServerClient(url) as client:
        assert client.is_server_ready(), "Triton itself does not notice, which is why the check infers"
    text[:] = [steps(5), steps(9)]
    state = health.check(url, "counting", 5.0, metrics_url)
    assert not state.healthy and not state.alive, f"a dead stub, whatever was counted: {state}"


@pytest.mark.server
def test_the_probe_command_exits_with_its_verdict(
    make_triton: MakeTriton, repository: Path, endpoint: Endpoint
) -> None:
    server = make_triton()
    server.wait_until_serving("counting", START_SECS)

    def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dspark_backend.serving.cli", "health", "--url", server.grpc_url, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    good = probe("--model", "counting")
    assert good.returncode == 0 and good.stdout.startswith("healthy: counting answered"), good
    bad = probe("--model", "missing")
    assert bad.returncode == 1 and "missing is not ready" in bad.stdout, bad
    assert probe("--ready-only").returncode == 0
    (repository / "counting" / "hang").touch()
    metrics_url, text = endpoint
    text[:] = [steps(5), steps(9)]
    busy = probe("--model", "counting", "--live", "--timeout", "0.5", "--metrics-url", metrics_url)
    assert busy.returncode == 0 and busy.stdout.startswith("busy: model counting gave no answer"), busy
    still = probe("--model", "counting", "--live", "--timeout", "0.5")
    assert still.returncode == 1 and health.beside(server.grpc_url) in still.stdout, still


@pytest.mark.parametrize(
    ("option", "value"), [("--timeout", "inf"), ("--timeout", "0"), ("--wait", "-1"), ("--wait", "inf")]
)
def test_times_that_cannot_be_waited_for(option, value):
    result = CliRunner().invoke(cli.app, ["health", option, value])
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.output
