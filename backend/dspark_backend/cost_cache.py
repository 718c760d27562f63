"""Keeps the measured cost model on disk: one file for each combination of models, machine and grid."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dspark_backend.cost import FORMAT_VERSION, CostModel
from dspark_backend.errors import ArtifactError
from dspark_backend.profile_grid import Grid, ProfilePlan
from dspark_backend.profiling import Progress, measure
from dspark_backend.stages.artifact import DrafterArtifact, VerifierArtifact
from dspark_backend.stages.protocol import DrafterStage, VerifierStage

logger = logging.getLogger(__name__)

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt")


def default_cache_directory() -> Path | None:
    """``cost`` in ``$DSPARK_CACHE``, ``$XDG_CACHE_HOME/dspark`` or ``~/.cache/dspark``; None where there is no home."""
    if given := os.environ.get("DSPARK_CACHE"):
        return Path(given).expanduser().resolve() / "cost"
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification tells to ignore a relative path.
        base = Path(root) if root.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "dspark" / "cost"


def device_description() -> dict[str, str | int]:
    """What of the machine bears on step times: processor, cores, and what of them this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    quota = ""
    with suppress(OSError):
        quota = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").strip()
    return {"processor": name, "cores": os.cpu_count() or 0, "usable_cores": usable, "quota": quota}


def _artifact_facts(artifact: VerifierArtifact | DrafterArtifact) -> dict[str, object]:
    return {
        "source_hash": artifact.source_hash,
        "files": artifact.files,
        "dtype": artifact.dtype,
        "runtime": artifact.runtime,
        "target_layer_ids": artifact.target_layer_ids,
        "max_context": artifact.max_context,
    }


def fingerprint(
    verifier: VerifierArtifact, drafter: DrafterArtifact | None, threads: int, plan: ProfilePlan, provider: str = ""
) -> str:
    """SHA-256 of everything that step times depend on. ``plan`` counts with its grid, not with its time limit."""
    runtimes = {}
    for package in _RUNTIMES:
        with suppress(importlib.metadata.PackageNotFoundError):
            runtimes[package] = importlib.metadata.version(package)
    facts = {
        "format_version": FORMAT_VERSION,
        "verifier": _artifact_facts(verifier),
        "drafter": _artifact_facts(drafter) if drafter else None,
        "threads": threads,
        "device": device_description(),
        "runtimes": runtimes,
        **({"provider": provider} if provider not in ("", "cpu") else {}),
        "grid": asdict(Grid.of(plan, verifier, drafter)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_cost_file(path: Path) -> tuple[str, CostModel]:
    """A file of the cache: the fingerprint of what was measured, and the cost model.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8 or not JSON.
        ArtifactError: it holds something else.
    """
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or raw.keys() != {"fingerprint", "model"}:
        raise ArtifactError("expected an object with fingerprint and model")
    return str(raw["fingerprint"]), CostModel.from_json(json.dumps(raw["model"]))


@dataclass(frozen=True)
class CostCache:
    """The place of one cost model on disk. Nothing here fails a load: what cannot be read is measured again."""

    directory: Path | None
    """None: nothing is kept."""
    fingerprint: str

    @property
    def path(self) -> Path | None:
        """Its file."""
        return None if self.directory is None else self.directory / f"cost-{self.fingerprint[:16]}.json"

    def load(self) -> CostModel | None:
        """The model, or None where there is none that can be used."""
        if self.path is None:
            return None
        try:
            found, model = read_cost_file(self.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ArtifactError) as error:  # JSON and UTF-8 errors are ValueErrors
            logger.warning("%s: cannot be read, measuring again: %s", self.path, error)
            return None
        if found != self.fingerprint:
            logger.warning("%s: measured for another model or machine; measuring again", self.path)
            return None
        return model

    def store(self, model: CostModel) -> None:
        """Write the model, all of it or nothing.

        Raises:
            OSError: the directory cannot be written.
        """
        if self.directory is None or self.path is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"fingerprint": self.fingerprint, "model": json.loads(model.to_json())}, indent=1)
        # An ordinary file, not one of tempfile's: the server may run as another user than who profiled.
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            scratch.write_text(text + "\n", encoding="utf-8")
            scratch.replace(self.path)
        finally:
            scratch.unlink(missing_ok=True)

    def invalidate(self) -> None:
        """Forget the model, so that the next load measures again."""
        if self.path is not None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s: cannot be removed: %s", self.path, error)


def load_or_measure(
    cache: CostCache, verifier: VerifierStage, drafter: DrafterStage | None, plan: ProfilePlan, progress: Progress
) -> CostModel:
    """The cost model from the cache; measured on the stages and stored where there is none.

    Call before the engine uses the stages: measuring loses what is in their caches.
    """
    model = cache.load()
    if model is not None:
        logger.info("cost model read from %s", cache.path)
        return model
    model = measure(verifier, drafter, plan, progress)
    try:
        cache.store(model)
    except OSError as error:
        logger.warning("%s: the cost model cannot be kept, the next load measures again: %s", cache.path, error)
    return model
