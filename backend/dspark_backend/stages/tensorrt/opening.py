"""Opens the engines of an artifact on a device: all checks, then the calls that need one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.cuda.device import CudaDevice, Device, open_cuda
from dspark_backend.stages.engine_contract import COMPUTE_DTYPES, DType, TensorSpec
from dspark_backend.stages.engine_info import EngineInfo
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.tensorrt.engine_file import (
    Engine,
    check_info,
    deserialise,
    load_module,
    read_engine,
)


class EngineOpener(Protocol):
    """Where a stage gets its device and its engines from."""

    @property
    def device(self) -> Device: ...

    def check(self, info: EngineInfo | None, directory: Path) -> EngineInfo:
        """Raises ArtifactError where the engines do not fit this machine."""

    def engine(
        self, directory: Path, name: str, info: EngineInfo, specs: Sequence[TensorSpec], profiles: int
    ) -> Engine:
        """Raises ArtifactError where it cannot be loaded."""


class CudaOpener:
    """Implements :class:`EngineOpener` on a GPU. Raises ConfigError where there is none."""

    def __init__(self, settings: StageSettings) -> None:
        self._device: CudaDevice = open_cuda(settings.device)

    @property
    def device(self) -> Device:
        return self._device

    def check(self, info: EngineInfo | None, directory: Path) -> EngineInfo:
        return check_info(info, directory, self._device.capability)

    def engine(
        self, directory: Path, name: str, info: EngineInfo, specs: Sequence[TensorSpec], profiles: int
    ) -> Engine:
        contents = read_engine(directory, name, info)
        module = load_module(info, directory)
        self._device.use()
        return deserialise(module, contents, directory / name, specs, profiles, self._device.stream)


def check_runtime(runtime: str, directory: Path) -> None:
    """Raises ArtifactError for an artifact of another runtime."""
    if runtime != "tensorrt":
        raise ArtifactError(f"{directory}: expected an artifact for tensorrt, got one for {runtime}")


def compute_dtype(dtype: str, directory: Path) -> DType:
    """What an artifact of this dtype computes in. Raises ArtifactError for one that engines have not."""
    if dtype not in COMPUTE_DTYPES:
        raise ArtifactError(
            f"{directory}: expected a dtype of {', '.join(COMPUTE_DTYPES)}, got {dtype!r}; export the stage again"
        )
    return COMPUTE_DTYPES[dtype]
