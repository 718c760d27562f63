"""What every export shares: a scratch folder that becomes the artifact only when all of it is there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dspark_backend.stages.artifact import STAGE_FILE
from dspark_export.errors import ExportError

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done."""

_TOOLS = ("dspark-triton", "onnx", "onnx_ir", "onnxruntime", "onnxruntime-gpu", "numpy")


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A scratch folder; its files move into ``out`` at the end, stage.json last, and only if nothing was raised.

    Raises:
        ExportError: a file cannot be read or written, as on a full disk.
    """
    try:
        yield from _published(out)
    except OSError as error:
        # numpy says "6144 requested and 250 written" of a full disk, and no more.
        place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(place).free / 2**20
        raise ExportError(
            f"{out}: the artifact is not written, since a file could not be read or written: {error} (without it "
            f"{free:.0f} MiB are free on that disk)"
        ) from error


def _published(out: Path) -> Iterator[Path]:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as scratch:
        work = Path(scratch)
        yield work
        _clear(out)
        for file in sorted(work.iterdir(), key=lambda file: file.name == STAGE_FILE):
            shutil.move(file, out / file.name)


def _clear(out: Path) -> None:
    """Remove what an earlier export left: stage.json first, then the files it names."""
    stage = out / STAGE_FILE
    try:
        named = json.loads(stage.read_text(encoding="utf-8"))["files"]
        old = [out / name for name in named if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        old = []  # none, or not ours to judge
    stage.unlink(missing_ok=True)
    for file in old:
        file.unlink(missing_ok=True)


def tool_versions() -> dict[str, str]:
    """Versions of the packages that shape an artifact, of those that are installed."""
    versions = {}
    for package in _TOOLS:
        # Only one of the two runtimes is there, and a checkout on the path is no installed package.
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a scratch folder, by name."""
    digests = {}
    for file in sorted(directory.iterdir()):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file of a scratch folder, by name."""
    return {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
