"""The model repository to serve: the checkout's, with the exported model in it. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from console import QuickstartError, stage
from environment import CHECKOUT, MODEL_PACKAGE, last_line

MARKER = "dspark-complete"
MODEL = "smollm2-135m"
DRAFTER = CHECKOUT / "export" / "pretrained" / MODEL
_INT8 = ("--dtype", "int8")
_LESS_TEXT = ("--check-tokens", "1500")
"""Than the default: a start should not take minutes. The calibration itself is not shortened."""
_DRAFTER = 'parameters: { key: "drafter", value: { string_value: "../../drafter/1" } }\n'


@dataclass(frozen=True)
class Export:
    """One call of dspark-export."""

    stage: str
    """verifier or drafter: the command."""
    name: str
    arguments: tuple[str, ...]
    """All but --out and --verifier."""
    target: Path | None = None
    """Of a drafter: the folder of the verifier's export, whose name says what is in it."""
    sources: tuple[Path, ...] = ()
    """Files whose contents it depends on, beside the exporter's own."""


def verifier(model: str, *arguments: str) -> Export:
    """Export of ``model``: what dspark-export takes as ``--model``."""
    name = Path(model).name if len(Path(model).parts) < 2 else "-".join(Path(model).parts[-2:])
    return Export("verifier", name, ("--model", model, *arguments))


def drafter(checkpoint: Path, target: Path, *arguments: str) -> Export:
    """Export of a drafter's checkpoint for the verifier in ``target``."""
    files = tuple(path for path in sorted(checkpoint.iterdir()) if path.is_file())
    return Export("drafter", checkpoint.name, ("--checkpoint", str(checkpoint), *arguments), target, files)


def served_verifier() -> Export:
    """What the quickstart serves: int8, handing out the layers that the shipped drafter reads."""
    config = json.loads((DRAFTER / "config.json").read_text(encoding="utf-8"))
    layers = ",".join(map(str, config["target_layer_ids"]))
    return verifier(MODEL, *_INT8, *_LESS_TEXT, "--target-layer-ids", layers)


def served_drafter(target: Path) -> Export:
    """The drafter that the project ships, for the verifier in ``target``."""
    return drafter(DRAFTER, target, *_INT8)


def export_key(salt: str, wanted: Export) -> str:
    """What an export depends on: the exporter's sources, the contract with the engine, its own inputs, and ``salt``."""
    target = wanted.target.name if wanted.target is not None else ""
    digest = hashlib.sha256("\0".join((salt, MODEL_PACKAGE, wanted.stage, target, *wanted.arguments)).encode())
    for folder in (CHECKOUT / "export" / "dspark_export", CHECKOUT / "backend" / "dspark_backend" / "stages"):
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.jsonl"))):
            digest.update(str(path.relative_to(CHECKOUT)).encode() + b"\0" + path.read_bytes())
    for path in wanted.sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def place_of(wanted: Export, salt: str, cache: Path) -> Path:
    """The folder that ``export`` fills with it."""
    return cache / "artifacts" / f"{wanted.stage}-{wanted.name}-{export_key(salt, wanted)}"


def is_complete(folder: Path) -> bool:
    """Does it hold a whole export?"""
    return (folder / MARKER).is_file()


def export(command: Sequence[str], wanted: Export, salt: str, cache: Path, log: Path) -> Path:
    """The folder of an exported stage; exported now unless it is there. Call it under the cache's lock.

    Args:
        command: how to call dspark-export.
        salt: whatever else the export depends on, such as package versions.

    Raises:
        QuickstartError: with the end of the exporter's output.
    """
    target = place_of(wanted, salt, cache)
    if is_complete(target):
        return target
    # Served copies are hard links: they keep their data.
    for earlier in target.parent.glob(f"{wanted.stage}-{wanted.name}-*"):
        shutil.rmtree(earlier, ignore_errors=True)
    target.mkdir(parents=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    pair = () if wanted.target is None else ("--verifier", str(wanted.target))
    with stage(f"exporting {wanted.stage} {wanted.name}", lambda: last_line(log)), log.open("wb") as file:
        code = subprocess.run(
            [*command, wanted.stage, *wanted.arguments, *pair, "--out", str(target)],
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


def assemble(target: Path, verifier_artifact: Path, drafter_artifact: Path | None = None) -> Path:
    """Lay a fresh repository at ``target``: the checkout's models with the artifacts in their version folders.

    With a drafter the ``dspark`` model speculates. Large files are hard links, because ONNX Runtime refuses external
    data behind a symbolic link.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(CHECKOUT / "model_repository", target, ignore=_artifacts)
    for name, artifact in (("verifier", verifier_artifact), ("drafter", drafter_artifact)):
        for path in _files(artifact) if artifact is not None else ():
            place = target / name / "1" / path.relative_to(artifact)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                os.link(path, place)
            except OSError:  # another file system, or one without hard links
                shutil.copy2(path, place)
    if drafter_artifact is not None:
        with (target / "dspark" / "config.pbtxt").open("a", encoding="utf-8") as config:
            config.write(_DRAFTER)
    return target


def _artifacts(folder: str, names: list[str]) -> list[str]:
    """What of a model repository's folder is not in git: caches, and artifacts that were exported into it."""
    kept = (".pbtxt", ".py", ".md")
    return [name for name in names if name == "__pycache__" or not (Path(folder, name).is_dir() or name.endswith(kept))]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
