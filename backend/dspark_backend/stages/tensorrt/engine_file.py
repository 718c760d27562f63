"""An engine on disk: checked against ``stage.json`` before anything of it is trusted, then deserialised."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from dspark_backend.errors import ArtifactError, InternalError
from dspark_backend.stages.engine_contract import TensorSpec
from dspark_backend.stages.engine_info import EngineInfo

logger = logging.getLogger(__name__)

BUILDERS = ("tensorrt", "tensorrt_rtx")
_DTYPES = {"int64": "INT64", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


class Context(Protocol):
    """An execution context: the state of one engine with one profile."""

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Of an input."""

    def address(self, name: str, address: int) -> None:
        """Of an input or output."""

    def enqueue(self) -> None:
        """Put the run on the device's stream."""

    @property
    def capturable(self) -> bool:
        """Whether ``enqueue`` may be captured into a graph."""


class Engine(Protocol):
    """A deserialised engine."""

    def scratch_size(self) -> int:
        """Bytes of activations that a context needs, whatever its profile."""

    def context(self, profile: int, scratch: int) -> Context:
        """A new context that keeps its activations at address ``scratch``."""


def check_info(info: EngineInfo | None, directory: Path, capability: tuple[int, int]) -> EngineInfo:
    """Make sure that engines were built, and for this GPU.

    Raises:
        ArtifactError: they were not; the message says what to do.
    """
    if info is None or not info.engines:
        raise ArtifactError(
            f"{directory}: expected built engines, found the graph alone; build them: dspark-export engine "
            f"--stage {directory} --out DIR"
        )
    if info.builder not in BUILDERS:
        raise ArtifactError(f"{directory}: expected the builder {' or '.join(BUILDERS)}, got {info.builder!r}")
    here = f"sm{capability[0]}{capability[1]}"
    if info.targets and here not in info.targets:
        raise ArtifactError(
            f"{directory}: expected engines for this GPU ({here}), they were built for {', '.join(info.targets)}; "
            f"build them again with --target {here}"
        )
    return info


def load_module(info: EngineInfo, directory: Path) -> ModuleType:
    """The package that built the engines, in the version that did.

    Raises:
        ArtifactError: it is not installed, or in another version.
    """
    try:
        module = importlib.import_module(info.builder)
    except ImportError as error:
        raise ArtifactError(
            f"{directory}: expected the package {info.builder} {info.version} that built the engines, which cannot be "
            f"imported ({error}); install it, or build the engines with what is installed here"
        ) from None
    if module.__version__ != info.version:
        raise ArtifactError(
            f"{directory}: expected {info.builder} {info.version}, which built the engines, found "
            f"{module.__version__}; install that version, or build the engines again: dspark-export engine"
        )
    return module


def read_engine(directory: Path, name: str, info: EngineInfo) -> bytes:
    """The bytes of an engine.

    Raises:
        ArtifactError: it is missing, or not the one that ``stage.json`` names.
    """
    wanted = info.engines.get(name)
    path = directory / name
    if wanted is None or not path.is_file():
        raise ArtifactError(f"{path}: expected an engine, found none; build it again: dspark-export engine")
    contents = path.read_bytes()
    found = hashlib.sha256(contents).hexdigest()
    if found != wanted:
        raise ArtifactError(
            f"{path}: expected SHA-256 {wanted[:12]}... as stage.json says, got {found[:12]}...; the file is corrupt "
            "or of another build; build it again: dspark-export engine"
        )
    return contents


def deserialise(
    module: ModuleType, contents: bytes, path: Path, specs: Sequence[TensorSpec], profiles: int, stream: int
) -> TensorRtEngine:
    """The engine, its tensors checked against what the runtime binds.

    Raises:
        ArtifactError: TensorRT refuses it, or it has other tensors or profiles.
    """
    trt: Any = module
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(contents)
    if engine is None:
        raise ArtifactError(
            f"{path}: {module.__name__} {module.__version__} cannot load the engine (its lines above say why); build "
            "it again on this machine or for this GPU: dspark-export engine"
        )
    check_tensors(trt, engine, path, specs, profiles)
    return TensorRtEngine(trt, runtime, engine, stream)


def check_tensors(trt: Any, engine: Any, path: Path, specs: Sequence[TensorSpec], profiles: int) -> None:
    """Make sure that an engine takes and gives what the contract says. Raises ArtifactError."""
    wanted = {spec.name: f"{spec.direction} {_DTYPES[spec.dtype]} of rank {len(spec.dims)}" for spec in specs}
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        direction = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        rank = len(engine.get_tensor_shape(name))
        found[name] = f"{direction} {engine.get_tensor_dtype(name).name} of rank {rank}"
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ArtifactError(
                f"{path}: tensor {name}: expected {wanted.get(name, 'none')}, got {found.get(name, 'none')}; export "
                "the stage and build its engine again with this version"
            )
    if engine.num_optimization_profiles != profiles:
        raise ArtifactError(
            f"{path}: expected {profiles} optimization profiles as stage.json says, got "
            f"{engine.num_optimization_profiles}; build it again: dspark-export engine"
        )


class TensorRtEngine:
    """Implements :class:`Engine` with ``tensorrt`` or ``tensorrt_rtx``, which have the same shape."""

    def __init__(self, trt: Any, runtime: Any, engine: Any, stream: int) -> None:
        self._trt = trt
        self._runtime = runtime  # must outlive the engine
        self._engine = engine
        self._stream = stream

    def scratch_size(self) -> int:
        engine = self._engine
        sizes = [
            engine.get_device_memory_size_for_profile_v2(index) for index in range(engine.num_optimization_profiles)
        ]
        return int(max(sizes))

    def context(self, profile: int, scratch: int) -> TensorRtContext:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise InternalError("TensorRT: expected an execution context, got none; its lines in the log say why")
        context.set_device_memory(scratch, self.scratch_size())
        if not context.set_optimization_profile_async(profile, self._stream):
            raise InternalError(f"TensorRT: optimization profile {profile} was refused; its lines in the log say why")
        return TensorRtContext(context, self._stream)


class TensorRtContext:
    """Implements :class:`Context`."""

    def __init__(self, context: Any, stream: int) -> None:
        self._context = context
        self._stream = stream

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise InternalError(f"TensorRT: input {name}: shape {shape} was refused; its lines in the log say why")

    def address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise InternalError(f"TensorRT: tensor {name}: its address was refused; its lines in the log say why")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise InternalError("TensorRT: the run was refused; its lines in the log say why")

    @property
    def capturable(self) -> bool:
        # Only tensorrt_rtx compiles kernels while it runs, and has this question.
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._stream))
