"""The real launcher with a real Triton."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import numpy as np
import pytest
import tritonclient.grpc as triton

from dspark_backend.serving import health, launcher, orphans
from dspark_backend.serving.launcher import Ending, ServerFailed
from dspark_backend.serving.options import PortInUse, Ports

from .conftest import BROKEN, MakeTriton, write_model

pytestmark = pytest.mark.server

START_SECS = 60.0


def stubs_of(server: int) -> list[int]:
    """Pids of the stubs whose arguments name ``server``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                arguments = (folder / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if orphans.declared_server(arguments) == server:
                found.append(int(folder.name))
    return found


def regions_of(pid: int) -> set[str]:
    """Names of the regions that a process maps."""
    text = Path(f"/proc/{pid}/maps").read_text()
    return {line.rpartition("/")[2] for line in text.splitlines() if orphans.REGION_PREFIX in line}


def gone(pid: int, timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_server_serves_and_stops_without_leaving_anything(make_triton: MakeTriton) -> None:
    server = make_triton()
    server.wait_until_serving("counting", START_SECS)
    (stub,), regions = stubs_of(server.pid), regions_of(server.pid)
    assert regions
    with triton.InferenceServerClient(server.grpc_url) as client:
        assert client.get_server_metadata().version
    ended = server.stop()
    assert ended.clean, ended
    assert gone(stub)
    assert not any((orphans.SHM_FOLDER / name).exists() for name in regions)


def test_a_stop_lets_a_request_in_flight_finish(
    make_triton: MakeTriton, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "IDLE_SECS", 1.0)  # this request is longer in flight
    server = make_triton()
    server.wait_until_serving("counting", START_SECS)
    (repository / "counting" / "slow").touch()
    answers: list[object] = []
    answered = Event()

    def keep(result: object, error: object) -> None:
        answers.append(error or result)
        answered.set()

    with triton.InferenceServerClient(server.grpc_url) as client, ThreadPoolExecutor(1) as pool:
        client.start_stream(keep)
        client.async_stream_infer("counting", [_int32("input_ids", [41]), _int32("max_tokens", [1])])
        time.sleep(0.5)
        stopping = pool.submit(server.stop)
        time.sleep(2.0)
        assert not answered.is_set()
        (repository / "counting" / "slow").unlink()
        assert answered.wait(5)
        client.stop_stream()  # Triton waits its whole exit timeout for a stream that a client keeps open
        ended = stopping.result()
    assert ended.clean, ended
    assert isinstance(answers[0], triton.InferResult), answers
    np.testing.assert_array_equal(answers[0].as_numpy("output_ids"), [42])


def test_a_stop_does_not_wait_for_what_triton_only_believes_to_be_in_flight(make_triton: MakeTriton) -> None:
    server = make_triton(exit_timeout_secs=60)
    server.wait_until_serving("counting", START_SECS)
    errors: SimpleQueue[object] = SimpleQueue()
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: errors.put(error))
        client.async_stream_infer("counting", [_int32("input_ids", [1]), _int32("unheard_of", [1])])
        assert "unheard_of" in str(errors.get(timeout=5))
    start = time.monotonic()
    ended = server.stop()
    assert ended.clean, ended
    assert time.monotonic() - start < 20


def test_a_server_that_hangs_is_killed_with_its_stubs(make_triton: MakeTriton, repository: Path) -> None:
    server = make_triton(exit_timeout_secs=60)
    server.wait_until_serving("counting", START_SECS)
    (repository / "counting" / "hang").touch()
    assert not health.check(server.grpc_url, "counting", timeout=0.5).healthy
    (stub,) = stubs_of(server.pid)
    ended = server.stop(timeout=1.0)
    assert ended.ending is Ending.KILLED
    assert gone(stub)


def test_a_model_that_does_not_load_is_reported_with_its_reason(make_triton: MakeTriton, repository: Path) -> None:
    write_model(repository, "broken", BROKEN)
    server = make_triton()
    with pytest.raises(ServerFailed, match=r"(?s)ended by itself.*this model never loads"):
        server.wait_until_serving("counting", START_SECS)


def test_only_the_named_models_are_loaded(make_triton: MakeTriton, repository: Path) -> None:
    write_model(repository, "broken", BROKEN)
    server = make_triton(models=("counting",))
    server.wait_until_serving("counting", START_SECS)


def test_a_port_in_use_stops_the_start(make_triton: MakeTriton) -> None:
    server = make_triton()
    server.wait_until_serving(None, START_SECS)
    with pytest.raises(PortInUse, match=str(server.options.ports.http)):
        make_triton(ports=server.options.ports)
    assert server.poll() is None


def test_what_a_killed_server_leaves_is_cleaned_by_the_next_start_and_live_servers_are_not_touched(
    make_triton: MakeTriton, repository: Path
) -> None:
    bystander, victim = make_triton(), make_triton()
    for server in (bystander, victim):
        server.wait_until_serving("counting", START_SECS)
    (stub,), regions = stubs_of(victim.pid), regions_of(victim.pid)
    (repository / "counting" / "hang").touch()  # a busy stub does not notice that its server died
    assert not health.check(victim.grpc_url, "counting", timeout=0.5).healthy
    os.kill(victim.pid, signal.SIGKILL)
    ended = victim.wait(5)
    assert ended is not None and ended.ending is Ending.SIGNALLED
    assert stub in orphans.orphan_stubs()
    for name in regions:
        os.utime(orphans.SHM_FOLDER / name, (0, 0))
    (repository / "counting" / "hang").unlink()
    successor = make_triton()
    assert gone(stub)
    assert not any((orphans.SHM_FOLDER / name).exists() for name in regions)
    for server in (bystander, successor):
        server.wait_until_serving("counting", START_SECS)


def test_a_server_ends_when_its_launcher_is_killed(repository: Path, tmp_path: Path) -> None:
    ports = Ports.free()
    command = [sys.executable, "-m", "dspark_backend.serving.cli", "--model-repository", str(repository)]
    command += ["--host", "127.0.0.1", "--http-port", str(ports.http), "--grpc-port", str(ports.grpc)]
    command += ["--metrics-port", str(ports.metrics), "--log-file", str(tmp_path / "log")]
    with subprocess.Popen(command) as parent:
        assert health.wait(f"127.0.0.1:{ports.grpc}", "counting", patience=START_SECS).healthy
        (server,) = [int(name) for name in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        parent.kill()
    assert gone(server, 20)
    ports.check_free("127.0.0.1")


def _int32(name: str, values: list[int]) -> triton.InferInput:
    tensor = triton.InferInput(name, [len(values)], "INT32")
    tensor.set_data_from_numpy(np.array(values, np.int32))
    return tensor
