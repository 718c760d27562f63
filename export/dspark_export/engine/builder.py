"""The package that builds: ``tensorrt`` where it is installed, else ``tensorrt_rtx``, which needs no GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_backend.stages.engine_contract import Profile
from dspark_export.engine.shapes import input_dims, profile_shapes
from dspark_export.errors import ExportError
from dspark_export.gpus import check_capability, first_capability

PACKAGES = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Builder:
    """An importable builder."""

    package: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def crosses(self) -> bool:
        """Whether it builds for GPUs that are not there."""
        return self.package == "tensorrt_rtx"


def find_builder(packages: Sequence[str] = PACKAGES) -> Builder:
    """The first package that is installed. Raises ExportError where none is."""
    for package in packages:
        try:
            return Builder(package, importlib.import_module(package))
        except ImportError:
            continue
    raise ExportError(
        "expected the package tensorrt or tensorrt_rtx, found neither; pip install 'dspark-triton[tensorrt]' (builds "
        "for this machine's GPU) or 'dspark-triton[tensorrt-rtx]' (builds without one)"
    )


def parse_targets(text: str, builder: Builder, precision: str) -> tuple[str, ...]:
    """Compute capabilities such as ``sm86,sm89``; empty is the GPU of this machine, or all that fit without one.

    Raises:
        ExportError: one that the builder does not know or that lacks the precision, or any where it builds for this
            machine alone.
    """
    if not builder.crosses:
        if text:
            raise ExportError(f"--target: {builder.package} builds for the GPU of this machine alone; leave it out")
        return ()
    known = {
        name.lower(): int(name[2:]) for name in dir(builder.module.ComputeCapability) if name.startswith("SM")
    }  # fmt: skip
    if not text:
        least = first_capability(precision)
        return tuple(sorted((name for name in known if known[name] >= least), key=known.__getitem__))
    targets = tuple(part.strip().lower() for part in text.split(","))
    for target in targets:
        if target not in known:
            raise ExportError(f"--target: expected some of {', '.join(sorted(known))}, got {target!r}")
        check_capability("--target", precision, target, known[target])
    return tuple(dict.fromkeys(targets))


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built."""

    targets: tuple[str, ...]
    workspace: int | None = None
    """Most bytes of scratch memory that a kernel may take; None: all there is."""
    timing_cache: Path | None = None
    """File with measured kernel times, read and written; ``tensorrt`` alone measures."""


def build_engine(
    builder: Builder,
    graph: Path,
    profiles: Sequence[Profile],
    settings: BuildSettings,
    progress: Callable[[float], None],
) -> bytes:
    """Compile a graph.

    Raises:
        ExportError: the parser refuses a node, which is named, or no engine fits the settings.
    """
    trt = builder.module
    log = _log(trt)
    maker = trt.Builder(log)
    network = maker.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        found = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ExportError(f"{graph}: {builder.package} {builder.version} cannot parse: {'; '.join(found)}")
    config = maker.create_builder_config()
    config.progress_monitor = _monitor(trt, progress)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.targets:
        config.num_compute_capabilities = len(settings.targets)
        for index, target in enumerate(settings.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    dims = input_dims(graph)
    for profile in profiles:
        made = maker.create_optimization_profile()
        for name, shapes in profile_shapes(dims, profile).items():
            made.set_shape(name, *shapes)
        if config.add_optimization_profile(made) < 0:
            raise ExportError(f"{graph}: {builder.package} refuses the profile {profile.name}: {log.last()}")
    cache = None
    if settings.timing_cache is not None:
        stored = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
        cache = config.create_timing_cache(stored)
        config.set_timing_cache(cache, ignore_mismatch=False)
    engine = maker.build_serialized_network(network, config)
    if engine is None:
        hint = " (--workspace may be too small)" if settings.workspace is not None else ""
        raise ExportError(f"{graph}: {builder.package} {builder.version} cannot build it{hint}: {log.last()}")
    if cache is not None and settings.timing_cache is not None:
        settings.timing_cache.write_bytes(bytes(cache.serialize()))
    return bytes(engine)


def _describe(error: Any) -> str:
    """Node and operator that a parser's error is about."""
    names = [str(part) for part in (error.node_operator(), error.node_name()) if part]
    return f"{' '.join(names) or 'the graph'}: {' '.join(str(error.desc()).split())}"


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a driver every build says so once; building needs none.
            if severity <= trt.ILogger.ERROR and "CUDA driver version is insufficient" not in message:
                self.errors.append(" ".join(message.split()))

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it gives no reason"

    return Log()


def _monitor(trt: Any, progress: Callable[[float], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Share of the outermost phase that is done."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = max(num_steps, 1)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                progress(min((step + 1) / self._steps[phase_name], 1.0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
