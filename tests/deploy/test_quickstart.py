"""deploy/quickstart/run as a user calls it. Its cache persists between runs: only the very first one installs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from artifacts import quickstart_cache
from first_start import FirstStart
from quickstart_calls import HOST, QUESTION, RUN, START_SECS, Quickstart, free_base
from server_state import until

from dspark_backend.serving.distribution import STUB_NAME
from dspark_client import DSparkClient, GenerateOptions, Message

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(300)]

STOP_SECS = 15.0
INSTANT_SECS = 5.0


@pytest.fixture(scope="module")
def once(first_start: FirstStart) -> subprocess.CompletedProcess[str]:
    return first_start.wait()


@pytest.fixture
def quickstart(once: object) -> Iterator[Quickstart]:
    """With a filled cache; stopped after the test whatever happens in it."""
    quickstart = Quickstart(quickstart_cache(), free_base())
    yield quickstart
    quickstart.run("--stop")
    # Its repository holds hard links, which would keep the data of artifacts that the cache has replaced.
    shutil.rmtree(quickstart.folder, ignore_errors=True)


@dataclass(frozen=True)
class Foreground:
    """A script that runs in a process group of its own, as in a terminal."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.err.read_text() or self.process.poll() is not None, START_SECS, text)
        assert self.process.poll() is None, self.err.read_text()


@pytest.fixture
def foreground(quickstart: Quickstart, tmp_path: Path) -> Iterator[Foreground]:
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            quickstart.command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=quickstart.variables,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
    yield Foreground(process, out, err)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # takes the server with it
        process.wait()
        until(lambda: not quickstart.processes(), STOP_SECS, "the server ends with its quickstart")


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, and that inherited, where the tests run in the background


def test_once_answers_on_stdout_and_leaves_nothing(
    first_start: FirstStart, once: subprocess.CompletedProcess[str]
) -> None:
    assert once.returncode == 0, once.stderr
    assert "Paris" in once.stdout
    assert once.stdout.endswith("\n")
    for progress in ("dspark quickstart", "serving after", "stopping the server: done in", " out"):
        assert progress in once.stderr
        assert progress not in once.stdout
    assert "Paris" not in once.stderr
    first_start.quickstart.check_gone()


def test_a_detached_server_reuses_the_cache_and_answers_until_it_is_stopped(
    quickstart: Quickstart, once: subprocess.CompletedProcess[str]
) -> None:
    started = quickstart.run("--detach")
    assert (started.returncode, started.stdout) == (0, ""), started.stderr
    for work in ("environment", "installing", "exporting", "first start"):
        assert work not in started.stderr
    assert f"stop it with: {RUN} --stop --port-base {quickstart.base}\n" in started.stderr

    with DSparkClient(quickstart.grpc_url) as client:
        (answer,) = client.generate(
            messages=[Message("user", QUESTION)], options=GenerateOptions(max_tokens=128), timeout=60
        )
    assert answer.text.rstrip("\n") == once.stdout.rstrip("\n")

    second = quickstart.run("--once", QUESTION, timeout=INSTANT_SECS)
    assert (second.returncode, second.stdout) == (1, "")
    assert f"already runs at port {quickstart.base}: stop it with --stop" in second.stderr

    stopped = quickstart.run("--stop", timeout=STOP_SECS)
    assert (stopped.returncode, stopped.stdout) == (0, ""), stopped.stderr
    quickstart.check_gone()
    again = quickstart.run("--stop", timeout=INSTANT_SECS)
    assert (again.returncode, again.stderr) == (0, f"no quickstart server runs at port {quickstart.base}\n")


def test_ctrl_c_ends_serving(quickstart: Quickstart, foreground: Foreground) -> None:
    foreground.wait_for("The server stays up until Ctrl-C")
    assert foreground.out.read_text().strip()
    assert len(quickstart.processes()) >= 2
    os.killpg(foreground.process.pid, signal.SIGINT)
    assert foreground.process.wait(STOP_SECS) == 0
    told = foreground.err.read_text()
    assert "stopping the server: done in" in told
    assert "did not stop cleanly" not in told
    assert "Traceback" not in told
    quickstart.check_gone()


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_start_leaves_nothing(
    quickstart: Quickstart, foreground: Foreground, send: Callable[[int, int], None]
) -> None:
    foreground.wait_for("starting Triton and loading the model")
    for process in (f"health --url {quickstart.grpc_url}", STUB_NAME):
        until(lambda process=process: any(process in line for line in quickstart.processes()), START_SECS, process)
    send(foreground.process.pid, signal.SIGINT if send is os.killpg else signal.SIGTERM)
    assert foreground.process.wait(STOP_SECS + 10) == 130
    told = foreground.err.read_text()
    assert told.endswith("\ninterrupted\n")
    assert "Traceback" not in told
    assert foreground.out.read_text() == ""
    quickstart.check_gone()


def test_a_server_that_cannot_load_is_explained(quickstart: Quickstart, tmp_path: Path) -> None:
    damaged = Quickstart(tmp_path, quickstart.base)
    for venv in quickstart.cache.glob("venv-*/"):
        (tmp_path / venv.name).symlink_to(venv)
    shutil.copytree(quickstart.cache / "artifacts", tmp_path / "artifacts", copy_function=os.symlink)
    (weights,) = tmp_path.glob("artifacts/*/model.onnx.data")
    weights.unlink()
    weights.write_bytes(b"cut")
    done = damaged.run("--once", QUESTION)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the server ended while it started" in done.stderr
    assert "model.onnx.data: expected" in done.stderr
    assert "dspark-export verifier" in done.stderr
    assert f"whole log: {damaged.folder / 'triton.log'}" in done.stderr
    damaged.check_gone()


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_port_in_use_is_named(tmp_path: Path, offset: int) -> None:
    quickstart = Quickstart(tmp_path, free_base())
    with socket.create_server((HOST, quickstart.base + offset)):
        begin = time.monotonic()
        done = quickstart.run("--once", QUESTION)
        assert time.monotonic() - begin < INSTANT_SECS
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: port {quickstart.base + offset} cannot be used (Address already in use)")
    assert "--port-base" in done.stderr
    assert not list(tmp_path.glob("venv-*"))


def test_a_cache_that_is_no_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = Quickstart(file, free_base()).run("--once", QUESTION, timeout=INSTANT_SECS)
    assert (done.returncode, done.stdout) == (1, "")
    assert str(file) in done.stderr
    assert "Not a directory" in done.stderr
    assert "DSPARK_CACHE" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--port-base", "65534"], "--port-base: expected 1 to 65533, got 65534"),
        (["--once", "Hi", "--detach"], "expected one of --once, --detach and --stop"),
    ],
)
def test_a_wrong_option_is_a_usage_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = Quickstart(tmp_path, free_base()).run(*arguments, timeout=INSTANT_SECS)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
