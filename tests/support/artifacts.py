"""Exported models for tests: the tiny golden ones, variants of them, and SmolLM2 from a cache."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dspark_backend.stages.artifact import STAGE_FILE
from dspark_export.verifier import VerifierExport, export_verifier

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.append(str(CHECKOUT / "deploy" / "quickstart"))

import repository as quickstart_repository  # noqa: E402
from environment import MARKER as VENV_MARKER  # noqa: E402
from locks import exclusive  # noqa: E402

GOLDEN = CHECKOUT / "tests" / "golden"
GOLDEN_NAMES = ("qwen3_vanilla", "qwen3_gated", "qwen3_rnn", "gemma4_vanilla")


def silent(stage: str, done: float) -> None:
    """Progress that nobody watches."""


def export(model: Path | str, out: Path, **options: Any) -> Path:
    """Export and return the artifact's directory."""
    export_verifier(VerifierExport(str(model), out, **options), silent)
    return out


def golden_taps(name: str) -> tuple[int, ...]:
    """The layers that the golden drafter reads."""
    config = json.loads((GOLDEN / name / "drafter" / "config.json").read_text())
    return tuple(config["target_layer_ids"])


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


def variant(artifact: Path, out: Path, **changes: Any) -> Path:
    """A copy of an artifact whose stage.json says something else."""
    shutil.copytree(artifact, out)
    stage = json.loads((out / STAGE_FILE).read_text())
    (out / STAGE_FILE).write_text(json.dumps(stage | changes))
    return out


def cache_folder() -> Path:
    """Where exports are kept between runs."""
    return Path(os.environ.get("DSPARK_TEST_CACHE") or "~/.cache/dspark-tests").expanduser().resolve()


def quickstart_cache() -> Path:
    """The quickstart's own, where its tests call it."""
    return cache_folder() / "quickstart"


def exported(model: str, folder: Path) -> Path:
    """The verifier artifact of what dspark-export takes as ``--model``, exported at most once for its sources.

    ``folder`` gets hard links of the cached files: a later run with newer sources may clear the cache meanwhile.
    """
    return _linked(cached_export(quickstart_repository.verifier(model)), folder)


def served_pair(folder: Path) -> tuple[Path, Path]:
    """Verifier and drafter that the quickstart serves: those of its cache, else exported as ``exported`` does."""
    with exclusive(quickstart_cache() / "prepare.lock"):
        verifier, drafter = _served_by_the_quickstart() or _served_pair()
        return _linked(verifier, folder / "verifier"), _linked(drafter, folder / "drafter")


def _served_by_the_quickstart() -> tuple[Path, Path] | None:
    for marker in quickstart_cache().glob(f"venv-*/{VENV_MARKER}"):
        key = marker.read_text()
        verifier = quickstart_repository.place_of(quickstart_repository.served_verifier(), key, quickstart_cache())
        drafter = quickstart_repository.place_of(
            quickstart_repository.served_drafter(verifier), key, quickstart_cache()
        )
        if quickstart_repository.is_complete(verifier) and quickstart_repository.is_complete(drafter):
            return verifier, drafter
    return None


def _served_pair() -> tuple[Path, Path]:
    # Apart from other exports of this model: a cache keeps one of each name.
    cache = cache_folder() / "served"
    verifier = cached_export(quickstart_repository.served_verifier(), cache)
    return verifier, cached_export(quickstart_repository.served_drafter(verifier), cache)


def cached_export(wanted: quickstart_repository.Export, cache: Path | None = None) -> Path:
    """The folder of an export of the quickstart's kind, made at most once for its sources. Never write into it."""
    packages = " ".join(f"{name}={version(name)}" for name in ("onnx", "onnx_ir", "numpy", "gguf"))
    cache = cache or cache_folder()
    with exclusive(cache / "export.lock"):
        return quickstart_repository.export(
            [sys.executable, "-m", "dspark_export.cli"],
            wanted,
            f"{platform.python_version()} {packages}",
            cache,
            cache / "export.log",
        )


def _linked(cached: Path, folder: Path) -> Path:
    shutil.copytree(cached, folder, copy_function=_link)
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
