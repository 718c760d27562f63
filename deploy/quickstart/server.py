"""The server of one quickstart: started, waited for, found again, stopped. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from console import QuickstartError, stage
from environment import CHECKOUT, Environment, last_line

EXIT_TIMEOUT_SECS = 10
STOP_SECS = EXIT_TIMEOUT_SECS + 10
DEATHSIG = CHECKOUT / "backend" / "dspark_backend" / "serving" / "deathsig.py"


@dataclass(frozen=True)
class Record:
    """A running server, as its state file tells."""

    pid: int
    started: int
    """The kernel's start time of the process, which tells it from a later one with the same pid."""
    port_base: int

    @property
    def alive(self) -> bool:
        return _started(self.pid) == self.started


class Server:
    """One server with its folder ``run``: repository, logs and state file."""

    def __init__(self, environment: Environment, run: Path, port_base: int) -> None:
        self.environment = environment
        self.run = run
        self.port_base = port_base
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.port_base + 1}"

    @property
    def log(self) -> Path:
        return self.run / "triton.log"

    @property
    def messages(self) -> Path:
        return self.run / "serve.log"

    @property
    def state(self) -> Path:
        return self.run / "server.json"

    def start(self, repository: Path, used: IO[str], detached: bool) -> None:
        """Start it.

        Args:
            used: the lock that marks the environment as used; the server keeps it as long as it lives.
            detached: let it outlive this process.
        """
        self.log.unlink(missing_ok=True)
        command = [str(self.environment.script("dspark-serve")), "--model-repository", str(repository)]
        command += ["--model", "dspark"]
        command += ["--host", "127.0.0.1", "--port-base", str(self.port_base), "--log-file", str(self.log)]
        command += ["--exit-timeout-secs", str(EXIT_TIMEOUT_SECS)]
        if not detached:
            command = [str(self.environment.python), str(DEATHSIG), str(os.getpid()), *command]
        with self.messages.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[used.fileno()],
                env=os.environ | {"COLUMNS": "200"},
            )
        record = Record(self._process.pid, _started(self._process.pid), self.port_base)
        self.state.write_text(json.dumps(asdict(record)))

    def wait_until_serving(self, timeout: float) -> None:
        """Wait for a real answer.

        Raises:
            QuickstartError: the server ended or gave no answer in time; with the lines that tell why.
        """
        assert self._process is not None
        command = [str(self.environment.script("dspark-serve")), "health", "--url", self.grpc_url]
        command += ["--wait", str(timeout)]
        with (
            stage("starting Triton and loading the model", lambda: last_line(self.messages)),
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as probe,
        ):
            try:
                while probe.poll() is None:
                    if self._process.poll() is not None:
                        raise QuickstartError(f"the server ended while it started\n{self.why()}")
                    time.sleep(0.1)
            finally:
                probe.terminate()  # a signal to this process alone does not reach it
            answer = probe.stdout.read().strip() if probe.stdout else ""
            if probe.returncode != 0:
                raise QuickstartError(f"the server cannot infer: {answer}\n{self.why()}")

    def answer(self, prompt: str) -> int:
        """Stream the answer to standard output; returns the client's exit code."""
        command = [str(self.environment.script("dspark")), *self.client_arguments(prompt)]
        return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode

    def client_arguments(self, prompt: str) -> Sequence[str]:
        return ["generate", "--url", self.grpc_url, "--chat", "--max-tokens", "128", "--stats", "--", prompt]

    def wait(self) -> int:
        """Block until the server ends by itself."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> bool:
        """Stop what ``start`` started. Returns whether it ended cleanly."""
        if self._process is None:
            return True
        code = self._process.poll()
        if code is None:
            with stage("stopping the server"):
                self._process.send_signal(signal.SIGTERM)
                try:
                    code = self._process.wait(STOP_SECS)
                except KeyboardInterrupt:  # impatient: a second signal makes dspark-serve kill the server
                    self._process.send_signal(signal.SIGTERM)
                    code = self._process.wait(STOP_SECS)
        self.state.unlink(missing_ok=True)
        return code == 0

    def why(self) -> str:
        """The last messages of dspark-serve, which quote the log's relevant lines where Triton failed."""
        text = self.messages.read_text(errors="replace") if self.messages.is_file() else ""
        lines = "\n".join(f"    {line}" for line in text.splitlines()[-25:])
        return f"{lines}\n  whole log: {self.log}"


def recorded(run: Path) -> Record | None:
    """The live server that was started with folder ``run``, if there is one."""
    try:
        record = Record(**json.loads((run / "server.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.alive else None


def stop_recorded(record: Record, run: Path) -> None:
    """Stop a server that another quickstart started.

    Raises:
        QuickstartError: it does not end.
    """
    with stage(f"stopping the server on port {record.port_base} (process {record.pid})"):
        os.kill(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECS
        while record.alive:
            if time.monotonic() > deadline:
                raise QuickstartError(f"process {record.pid} did not end within {STOP_SECS} s: kill -9 {record.pid}")
            time.sleep(0.1)
    (run / "server.json").unlink(missing_ok=True)


def _started(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in ("Z", "X") else int(fields[19])
