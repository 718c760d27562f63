"""Processes with a stub's name and arguments stand for stubs of servers that are long gone or still there."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspark_backend.serving import orphans
from dspark_backend.serving.distribution import STUB_NAME

StartStub = Callable[[int], subprocess.Popen[bytes]]


@pytest.fixture
def start_stub(tmp_path: Path) -> Iterator[StartStub]:
    """Starts a process that looks like a stub of the server with the given pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start(server: int) -> subprocess.Popen[bytes]:
        region = f"{orphans.REGION_PREFIX}{uuid.uuid4()}"
        # A shell that waits for a line, under the stub's name.
        arguments = [str(tmp_path / STUB_NAME), "-c", "read line", "model.py", region, "1", "1", str(server)]
        stub = subprocess.Popen(
            [*arguments, "/backends", "336", "m_0", "DEFAULT"], executable="/bin/bash", stdin=subprocess.PIPE
        )
        started.append(stub)
        while region.encode() not in Path(f"/proc/{stub.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        return stub

    yield start
    for stub in started:
        stub.kill()
        stub.communicate()


@pytest.fixture
def make_region() -> Iterator[Callable[[float], Path]]:
    """Makes a region of the given age in seconds."""
    made: list[Path] = []

    def make(age: float) -> Path:
        path = orphans.SHM_FOLDER / f"{orphans.REGION_PREFIX}test-{uuid.uuid4()}"
        path.write_bytes(bytes(4096))
        os.utime(path, (time.time() - age, time.time() - age))
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def test_the_servers_pid_is_read_from_a_stubs_arguments() -> None:
    line = ["/b/triton_python_backend_stub", "/m.py", f"{orphans.REGION_PREFIX}1", "1048576", "1048576", "5758", "/b"]
    assert orphans.declared_server(line) == 5758
    assert orphans.declared_server(line[:4]) is None
    assert orphans.declared_server(["triton_python_backend_stub", "--help"]) is None


def test_a_stub_of_a_dead_server_is_ended(start_stub: StartStub) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    stub = start_stub(gone.pid)
    assert stub.pid in orphans.orphan_stubs()
    assert stub.pid in orphans.clean(grace_secs=0.2).stubs
    assert stub.wait(5) != 0


def test_a_stub_of_a_live_server_is_left_alone(start_stub: StartStub) -> None:
    stub = start_stub(os.getpid())
    assert stub.pid not in orphans.orphan_stubs()
    orphans.clean(grace_secs=0.2)
    assert stub.poll() is None


def test_a_region_that_nobody_maps_is_removed(make_region: Callable[[float], Path]) -> None:
    region = make_region(60)
    assert region.name in orphans.remove_stale_regions()
    assert not region.exists()


def test_a_region_in_use_is_left_alone(make_region: Callable[[float], Path]) -> None:
    region = make_region(60)
    with region.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        orphans.remove_stale_regions()
        assert region.exists()
    assert region.name in orphans.remove_stale_regions()


def test_a_region_that_was_just_made_is_left_alone(make_region: Callable[[float], Path]) -> None:
    region = make_region(0)
    orphans.remove_stale_regions()
    assert region.exists()


def test_other_shared_memory_is_left_alone() -> None:
    other = orphans.SHM_FOLDER / f"dspark-test-{uuid.uuid4()}"
    other.write_bytes(b"x")
    os.utime(other, (0, 0))
    try:
        orphans.remove_stale_regions()
        assert other.exists()
    finally:
        other.unlink()
