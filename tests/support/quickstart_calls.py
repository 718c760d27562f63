"""Calls of deploy/quickstart/run as a user makes them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
from artifacts import CHECKOUT

from dspark_backend.serving.options import Ports

RUN = CHECKOUT / "deploy" / "quickstart" / "run"
QUESTION = "Tell me the capital of France in one sentence."
"""Up to the answer the best next token leads by 1.8 logits or more, in float32 and int8. (Asked "What is the capital of
France?", the model begins its answer in English or in French by a lead of 0.1: the export's rounding, which differs by
processor and threads, decides.)"""
HOST = "127.0.0.1"
START_SECS = 60.0


@dataclass(frozen=True)
class Quickstart:
    """Calls of the script with one cache and one base of ports."""

    cache: Path
    base: int

    @property
    def folder(self) -> Path:
        """Repository, logs and state file of the server."""
        return self.cache / "run" / str(self.base)

    @property
    def grpc_url(self) -> str:
        return f"{HOST}:{self.base + 1}"

    @property
    def command(self) -> list[str]:
        return [str(RUN), "--port-base", str(self.base)]

    @property
    def variables(self) -> dict[str, str]:
        return os.environ | {"DSPARK_CACHE": str(self.cache)}

    def run(self, *arguments: str, timeout: float = START_SECS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.variables,
        )

    def processes(self) -> list[str]:
        """Command lines of what belongs to the server: itself, its stubs, probes and clients."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if str(self.folder) in line or self.grpc_url in line:
                found.append(line)
        return found

    def check_gone(self) -> None:
        assert self.processes() == []
        Ports.from_base(self.base).check_free(HOST)
        assert not (self.folder / "server.json").exists()


def free_base() -> int:
    """The first of three consecutive ports that nobody uses."""
    return Ports.free(HOST).http
