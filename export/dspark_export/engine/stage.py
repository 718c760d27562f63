"""From the exported graphs of a stage to a directory with its engines."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import (
    STAGE_FILE,
    DrafterArtifact,
    VerifierArtifact,
    load_drafter_artifact,
    load_verifier_artifact,
    save_artifact,
)
from dspark_backend.stages.engine_contract import (
    CONTEXT_ENGINE,
    DRAFT_ENGINE,
    SAMPLER_ENGINE,
    VERIFIER_ENGINE,
    Profile,
    Workload,
)
from dspark_backend.stages.engine_info import ProfileInfo
from dspark_export.engine.builder import Builder, BuildSettings, find_builder, parse_targets
from dspark_export.engine.worker import build_apart
from dspark_export.errors import ExportError
from dspark_export.publish import Progress, file_digests, file_sizes, published
from dspark_export.tensorrt_graphs import CONTEXT_GRAPH, DRAFT_GRAPH, RUNTIME, SAMPLER_GRAPH, VERIFIER_GRAPH

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineExport:
    """What to build, and how."""

    stage: Path
    out: Path
    profiles: str = ""
    """Such as ``slots=16,prefill_chunk=512,block_size=7``; what is missing takes the default."""
    precision: str = ""
    """Checked against the graph's, which fixes it; empty takes that."""
    workspace: int | None = None
    timing_cache: Path | None = None
    target: str = ""


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that was written."""

    file: str
    size: int
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """An engine to be built."""

    graph: str
    engine: str
    profiles: Sequence[Profile]


def export_engine(
    options: EngineExport, progress: Progress, builder: Builder | None = None
) -> tuple[VerifierArtifact | DrafterArtifact, tuple[BuiltEngine, ...]]:
    """Build a stage's engines into ``options.out``; nothing changes there unless all of them were built.

    Raises:
        ExportError: no builder, an option that does not fit the graph or the builder, or a graph it refuses.
        ArtifactError: the stage is missing or damaged.
    """
    artifact = _load(options.stage)
    info = artifact.engine
    if artifact.runtime != RUNTIME or info is None:
        raise ExportError(
            f"{options.stage}: expected a stage exported with --runtime tensorrt, got one for {artifact.runtime}"
        )
    if options.precision and options.precision != artifact.dtype:
        raise ExportError(
            f"--precision: the graph is strongly typed, in {artifact.dtype}; for {options.precision} export the stage "
            f"again with --dtype {options.precision}"
        )
    missing = [graph for graph in _graphs(artifact) if not (options.stage / graph).is_file()]
    if missing:
        raise ExportError(
            f"{options.stage}: expected {', '.join(missing)}; was it built already? build from the export, "
            "of this version"
        )
    builder = builder or find_builder()
    settings = BuildSettings(
        parse_targets(options.target, builder, artifact.dtype), options.workspace, options.timing_cache
    )
    plans = _plans(artifact, _workload(options.profiles, artifact), info.padding)
    built: list[BuiltEngine] = []
    denied: tuple[str, ...] = ()
    with published(options.out) as work:
        for plan in plans:
            begin = time.perf_counter()
            label = f"build {plan.engine}"
            progress(label, 0.0)
            denied = build_apart(
                builder, options.stage / plan.graph, plan.profiles, settings,
                work / plan.engine, partial(progress, label),
            )  # fmt: skip
            size = (work / plan.engine).stat().st_size
            built.append(BuiltEngine(plan.engine, size, time.perf_counter() - begin))
        for name in artifact.files:
            if not name.endswith((".onnx", ".onnx.data")):
                shutil.copy2(options.stage / name, work / name)
        if denied and builder.crosses:
            logger.warning(
                "this system lets no process run %s: another build of these engines may differ in some bytes",
                " or ".join(denied),
            )
        digests = file_digests(work)
        made = replace(
            info,
            builder=builder.package,
            version=builder.version,
            precision=artifact.dtype,
            targets=settings.targets,
            profiles=tuple(_info(plan.engine, profile) for plan in plans for profile in plan.profiles),
            engines={plan.engine: digests[plan.engine] for plan in plans},
            reproducible=builder.crosses and not denied,
        )
        artifact = replace(
            artifact,
            engine=made,
            tool_versions={**artifact.tool_versions, builder.package: builder.version},
            files=file_sizes(work),
            digests=digests,
        )
        save_artifact(artifact, work)
    return artifact, tuple(built)


def _load(directory: Path) -> VerifierArtifact | DrafterArtifact:
    try:
        kind = json.loads((directory / STAGE_FILE).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{directory}: expected a stage that dspark-export verifier or drafter wrote, got {error}"
        ) from error
    return load_drafter_artifact(directory) if kind == "drafter" else load_verifier_artifact(directory)


def _graphs(artifact: VerifierArtifact | DrafterArtifact) -> tuple[str, ...]:
    if isinstance(artifact, DrafterArtifact):
        return DRAFT_GRAPH, CONTEXT_GRAPH
    return VERIFIER_GRAPH, SAMPLER_GRAPH


def _workload(text: str, artifact: VerifierArtifact | DrafterArtifact) -> Workload:
    sizes = {"slots": 16, "prefill_chunk": 512, "block_size": 7}
    if isinstance(artifact, DrafterArtifact):
        sizes["block_size"] = artifact.block_size
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        if name not in sizes or not value.isdecimal() or int(value) < 1:
            raise ExportError(
                f"--profiles: expected such as slots=16,prefill_chunk=512,block_size=7, numbers from 1, got {part!r}"
            )
        sizes[name] = int(value)
    if isinstance(artifact, DrafterArtifact) and sizes["block_size"] != artifact.block_size:
        raise ExportError(f"--profiles: the drafter's block_size is {artifact.block_size}, got {sizes['block_size']}")
    return Workload(artifact.max_context, **sizes)


def _plans(
    artifact: VerifierArtifact | DrafterArtifact, work: Workload, padding: int
) -> tuple[_Plan, ...]:  # fmt: skip
    if work.padding > padding:
        raise ExportError(
            f"--profiles: prefill_chunk + block_size: the graph's caches have room for {padding}, got {work.padding}"
        )
    if isinstance(artifact, DrafterArtifact):
        return (
            _Plan(DRAFT_GRAPH, DRAFT_ENGINE, work.draft_profiles()),
            _Plan(CONTEXT_GRAPH, CONTEXT_ENGINE, work.context_profiles()),
        )
    return (
        _Plan(VERIFIER_GRAPH, VERIFIER_ENGINE, work.verifier_profiles()),
        _Plan(SAMPLER_GRAPH, SAMPLER_ENGINE, work.sampler_profiles()),
    )


def _info(engine: str, profile: Profile) -> ProfileInfo:
    return ProfileInfo(
        engine, profile.name, {symbol: (size.low, size.best, size.high) for symbol, size in profile.ranges.items()}
    )
