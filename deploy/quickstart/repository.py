"""The model repository to serve: the checkout's, with the exported model in it. Standard library only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from console import QuickstartError, stage
from environment import CHECKOUT, MODEL_PACKAGE, last_line

MARKER = "dspark-complete"


def export_key(salt: str, model: str) -> str:
    """What an export depends on: the exporter's sources, the contract with the engine, the model, and ``salt``."""
    digest = hashlib.sha256(f"{salt}\0{MODEL_PACKAGE}\0{model}\0".encode())
    for folder in (CHECKOUT / "export" / "dspark_export", CHECKOUT / "backend" / "dspark_backend" / "stages"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(CHECKOUT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def export(command: Sequence[str], model: str, salt: str, cache: Path, log: Path) -> Path:
    """The folder of a model's exported verifier; exported now unless it is there. Call it under the cache's lock.

    Args:
        command: how to call dspark-export.
        model: what dspark-export takes as ``--model``.
        salt: whatever else the export depends on, such as package versions.

    Raises:
        QuickstartError: with the end of the exporter's output.
    """
    name = Path(model).name if len(Path(model).parts) < 2 else "-".join(Path(model).parts[-2:])
    target = cache / "artifacts" / f"verifier-{name}-{export_key(salt, model)}"
    if (target / MARKER).is_file():
        return target
    for earlier in target.parent.glob(f"verifier-{name}-*"):  # served copies are hard links: they keep their data
        shutil.rmtree(earlier, ignore_errors=True)
    target.mkdir(parents=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with stage(f"exporting {name}", lambda: last_line(log)), log.open("wb") as file:
        code = subprocess.run(
            [*command, "verifier", "--model", model, "--out", str(target)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
        if code != 0:
            end = "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-12:])
            raise QuickstartError(f"the export failed (exit code {code})\n{end}\n  whole log: {log}")
    (target / MARKER).touch()
    return target


def assemble(artifact: Path, target: Path) -> Path:
    """Lay a fresh repository at ``target``: the checkout's models, and the artifact's files in verifier/1.

    Large files are hard links, because ONNX Runtime refuses external data behind a symbolic link.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(CHECKOUT / "model_repository", target, ignore=_artifacts)
    for path in _files(artifact):
        place = target / "verifier" / "1" / path.relative_to(artifact)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(path, place)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(path, place)
    return target


def _artifacts(folder: str, names: list[str]) -> list[str]:
    """What of a model repository's folder is not in git: caches, and artifacts that were exported into it."""
    kept = (".pbtxt", ".py", ".md")
    return [name for name in names if name == "__pycache__" or not (Path(folder, name).is_dir() or name.endswith(kept))]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
