"""The quickstart's first start: a whole ``--once``, which installs and exports where its cache is empty.

It takes two minutes, most of them on one processor, so it begins with the first test of a session and runs beside
others. Of several processes that share the session's tests, the first begins it; any may use it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
from artifacts import quickstart_cache
from quickstart_calls import QUESTION, Quickstart, free_base
from server_state import until

INSTALL_SECS = 280.0
STOP_SECS = 30.0


@dataclass(frozen=True)
class FirstStart:
    """``folder``, an empty one at first, gets what is known of it."""

    folder: Path

    @property
    def quickstart(self) -> Quickstart:
        return Quickstart(quickstart_cache(), int((self.folder / "base").read_text()))

    def begin(self) -> None:
        """Start it, unless another process did."""
        try:
            (self.folder / "begun").touch(exist_ok=False)
        except FileExistsError:
            return
        (self.folder / "base").write_text(str(free_base()))
        command = shlex.join([*self.quickstart.command, "--once", QUESTION])
        process = subprocess.Popen(
            ["bash", "-c", f"{command} >out 2>err; echo $? >ending && mv ending code"],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            env=self.quickstart.variables,
            start_new_session=True,
        )
        (self.folder / "pid").write_text(str(process.pid))

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What it answered and told."""
        out, err, code = (self.folder / name for name in ("out", "err", "code"))
        until(code.is_file, INSTALL_SECS, "the first start has ended")
        command = [*self.quickstart.command, "--once", QUESTION]
        return subprocess.CompletedProcess(command, int(code.read_text()), out.read_text(), err.read_text())

    def end(self) -> None:
        """Stop it where it still runs, with its server, and remove the folders."""
        if (self.folder / "pid").is_file():
            if not (self.folder / "code").is_file():
                self._stop(int((self.folder / "pid").read_text()))
            shutil.rmtree(self.quickstart.folder, ignore_errors=True)
        shutil.rmtree(self.folder)

    def _stop(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            parts = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            os.killpg(pid, signal.SIGTERM)
            _, left = psutil.wait_procs(parts, STOP_SECS)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
