"""An engine of ``peers`` in a process of its own, in the peers' environment, stopped while it is not asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

BENCH = Path(__file__).resolve().parents[1]
REQUIREMENTS = BENCH / "requirements-peers.txt"


class PeerFailed(Exception):
    """An engine cannot be used here; the message ends with its log's last lines."""


@dataclass(frozen=True)
class PeerReply:
    """As ``peers.protocol.Reply``, which lives in the other environment."""

    ids: list[int]
    first_secs: float
    decode_secs: float


def environment(folder: Path) -> Path:
    """The Python of an environment with the peers in it, made now if it is missing or of other requirements.

    Raises:
        PeerFailed: pip could not install them.
    """
    python, marker = folder / "bin" / "python", folder / "requirements-peers.txt"
    wanted = REQUIREMENTS.read_text()
    if not (python.exists() and marker.is_file() and marker.read_text() == wanted):
        print(f"making {folder} of {REQUIREMENTS.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        log = folder / "pip.log"
        install = [str(python), "-m", "pip", "install", "--prefer-binary", "-r", str(REQUIREMENTS)]
        _run(install, log, "installing the peers failed")
        marker.write_text(wanted)
    return python


def prepare(python: Path, gguf: Path, cache: Path) -> tuple[Path, Path]:
    """Model folders made from the GGUF file: (float32 checkpoint, ONNX Runtime GenAI's). Made once.

    Raises:
        PeerFailed: a peer's own converter failed.
    """
    checkpoint, genai = cache / "checkpoint", cache / "onnxruntime-genai-int4"
    if not (genai / "genai_config.json").is_file():
        print("converting the model for the peers", flush=True)
        _run([str(python), "-m", "peers.prepare", str(gguf), str(checkpoint), str(genai)], cache / "prepare.log", "")
    return checkpoint, genai


class PeerProcess:
    """One engine. Between calls its process is stopped, so that no thread of it waits by spinning."""

    def __init__(self, python: Path, engine: str, settings: dict[str, Any], log: Path) -> None:
        """Start it and wait until it is open.

        Raises:
            PeerFailed: it ended first.
        """
        self._log = log
        threads = {"OMP_NUM_THREADS": str(settings["threads"]), "MKL_NUM_THREADS": str(settings["threads"])}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", "peers.worker", engine, json.dumps(settings)],
                cwd=BENCH,
                env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | threads,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        opened = self._read()
        self.precision: str = opened["precision"]
        self.version: str = opened["version"]
        self._pause()

    def generate(self, prompts: Sequence[Sequence[int]], streams: int, tokens: int) -> tuple[list[PeerReply], float]:
        """Replies, and the seconds that all of them took.

        Raises:
            PeerFailed: the process ended, or a reply has another number of tokens than asked for.
        """
        self._process.send_signal(signal.SIGCONT)
        pipe = _open(self._process.stdin)
        pipe.write(json.dumps({"prompts": prompts, "streams": streams, "tokens": tokens}) + "\n")
        pipe.flush()
        answer = self._read()
        self._pause()
        replies = [PeerReply(**reply) for reply in answer["replies"]]
        for reply in replies:
            if len(reply.ids) != tokens:
                raise PeerFailed(f"{self.version}: expected {tokens} tokens, got {len(reply.ids)}")
        return replies, answer["seconds"]

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        _open(self._process.stdin).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def _read(self) -> dict[str, Any]:
        line = _open(self._process.stdout).readline()
        if not line:
            self._process.wait()
            raise PeerFailed(f"the engine ended\n{_end(self._log)}")
        content: dict[str, Any] = json.loads(line)
        return content


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _run(command: Sequence[str], log: Path, failure: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=BENCH, env=variables, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0:
        raise PeerFailed(f"{failure or 'converting the model failed'} (exit code {code})\n{_end(log)}")


def _end(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-12:]
    return "\n".join([*(f"    {line}" for line in lines), f"  whole log: {log}"])
