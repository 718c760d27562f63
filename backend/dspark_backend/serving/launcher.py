"""One Triton process from start to clean end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from dspark_backend.errors import ConfigError, DSparkError
from dspark_backend.serving import deathsig, health, orphans, server_log
from dspark_backend.serving.distribution import Distribution, server_environment
from dspark_backend.serving.idle import requests_in_flight
from dspark_backend.serving.options import ServeOptions

log = logging.getLogger(__name__)

KILL_SLACK_SECS = 3.0
"""How much longer than its exit timeout Triton may take. It hangs where a client keeps a stream open."""

IDLE_SECS = 4.0
"""A stop gives up on Triton when nothing was in flight for this long. Triton (seen in 2.51) loses count of a stream
that is cancelled just after its last response, or that named an unknown tensor, and then waits for it in vain."""


class ServerFailed(DSparkError):
    """The server ended by itself or did not become able to infer; the message holds the log's relevant lines."""


class Ending(Enum):
    """How a server ended."""

    STOPPED = "stopped on request"
    ENDED_IDLE = "stopped on request: nothing was in flight any more, so it was ended"
    KILLED = "did not stop within its exit timeout and was killed"
    EXITED = "ended by itself"
    SIGNALLED = "was ended by a signal"


@dataclass(frozen=True)
class Exit:
    """The end of a server process. ``code`` is its exit code, or minus the signal's number."""

    ending: Ending
    code: int

    @property
    def clean(self) -> bool:
        """No request was lost by a stop that was asked for."""
        return self.ending is Ending.ENDED_IDLE or (self.ending is Ending.STOPPED and self.code == 0)

    def __str__(self) -> str:
        if self.ending is Ending.SIGNALLED:
            return f"tritonserver was ended by {signal.Signals(-self.code).name}"
        return f"tritonserver {self.ending.value} (exit code {self.code})"


class TritonServer:
    """Starts and stops one tritonserver with its Python stubs. Also a context manager.

    The server runs in a session of its own, so that nothing of it outlives ``stop()``, and gets SIGTERM when this
    process dies.
    """

    def __init__(self, options: ServeOptions, distribution: Distribution) -> None:
        self.options = options
        self.distribution = distribution
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._killed: Ending | None = None
        self.log_start = 0
        """Bytes of the log file that belong to earlier runs."""

    @property
    def pid(self) -> int:
        """The server's process id, which is its process group's too."""
        if self._process is None:
            raise DSparkError("the server is not started: call start() first")
        return self._process.pid

    @property
    def grpc_url(self) -> str:
        """``host:port``, as gRPC clients take it."""
        return f"{_reachable(self.options.host)}:{self.options.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://{_reachable(self.options.host)}:{self.options.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.options.host)}:{self.options.ports.metrics}/metrics"

    def command(self) -> list[str]:
        backends = self.distribution.backend_directory
        return [
            str(self.distribution.binary),
            *([f"--backend-directory={backends}"] if backends else []),
            *self.options.arguments(),
        ]

    def start(self, clean_orphans: bool = True) -> None:
        """Start the process and return at once; ``wait_until_serving`` waits for it.

        Raises:
            PortInUse: before anything is started.
            ConfigError: the host is none to listen on, or the log file cannot be written.
        """
        self.options.ports.check_free(self.options.host)
        if clean_orphans:
            orphans.clean()
        command = self.command()
        log.debug("starting %s", " ".join(command))
        path = self.options.log_file
        if path is not None:
            self.log_start = path.stat().st_size if path.exists() else 0
        with _log(path) if path else nullcontext() as output:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", deathsig.__file__, str(os.getpid()), *command],
                env=server_environment(self.distribution),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def poll(self) -> Exit | None:
        """How the server ended, or None while it runs."""
        code = self._process.poll() if self._process else None
        return None if code is None else self._ended(code)

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Wait for the end; None after ``timeout`` seconds without one."""
        if self._process is None:
            return None
        try:
            return self._ended(self._process.wait(timeout))
        except subprocess.TimeoutExpired:
            return None

    def wait_until_serving(
        self, model: str | None, timeout: float, progress: Callable[[float], None] | None = None
    ) -> float:
        """Wait until the server is ready, listens on all its ports and, with a model's name, has answered an inference.

        Args:
            model: a model that speaks the wire contract of ``dspark``; None waits for readiness only.
            timeout: seconds.
            progress: called about twice a second with the seconds that passed.

        Returns:
            Seconds that it took.

        Raises:
            ServerFailed: the server ended, or time ran out.
        """
        start = time.monotonic()
        last = "not asked yet"
        while (elapsed := time.monotonic() - start) < timeout:
            if (ended := self.poll()) is not None:
                raise ServerFailed(self._explain(f"{ended} before it could serve"))
            state = health.check(self.grpc_url, model, timeout=min(10.0, max(1.0, timeout - elapsed)))
            # gRPC comes up first: a server may be ready there while nobody listens for HTTP yet.
            if state.healthy and (silent := self._silent_port()) is None:
                return time.monotonic() - start
            last = f"nobody listens on port {silent}" if state.healthy else state.reason
            if progress is not None:
                progress(elapsed)
            self.wait(0.5)
        raise ServerFailed(self._explain(f"the server could not serve after {timeout:.0f} s: {last}"))

    def _silent_port(self) -> int | None:
        for _, port in self.options.ports.named():
            try:
                socket.create_connection((_reachable(self.options.host), port), timeout=1.0).close()
            except OSError:
                return port
        return None

    def stop(self, timeout: float | None = None) -> Exit:
        """Ask the server to finish, wait, then end whatever is left of its process group.

        Args:
            timeout: seconds until it is killed; by default the options' exit timeout and some slack.
        """
        if self._process is None:
            raise DSparkError("the server is not started: call start() first")
        if self.poll() is None:
            self._stopping = True
            self._process.send_signal(signal.SIGTERM)
            limit = self.options.exit_timeout_secs + KILL_SLACK_SECS if timeout is None else timeout
            self._wait_for_end(limit)
        ended = self._ended(self._process.wait())
        self._end_group()
        return ended

    def kill(self, ending: Ending = Ending.KILLED) -> None:
        """End the whole process group now; ``ending`` is what the exit will say."""
        if self._process is not None and self._process.poll() is None:
            self._killed = ending
            self._end_group()
            self._process.wait()

    def _wait_for_end(self, limit: float) -> None:
        start = busy = time.monotonic()
        while self.wait(min(0.5, limit)) is None:
            now = time.monotonic()
            if requests_in_flight(self.metrics_url) != 0:
                busy = now
            if now - start >= limit:
                self.kill()
            elif now - busy >= IDLE_SECS:
                self.kill(Ending.ENDED_IDLE)

    def _ended(self, code: int) -> Exit:
        if self._killed is not None:
            return Exit(self._killed, code)
        if self._stopping:
            return Exit(Ending.STOPPED, code)
        return Exit(Ending.SIGNALLED if code < 0 else Ending.EXITED, code)

    def _end_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        orphans.remove_stale_regions()

    def _explain(self, what: str) -> str:
        lines = server_log.tail(self.options.log_file, start=self.log_start)
        return f"{what}\n{lines}\nwhole log: {self.options.log_file}" if lines else what

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _log(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        raise ConfigError(f"log file: expected a file that can be written, got {path} ({error.strerror})") from error


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
