"""Engines that compute on the host: exported graphs of the TensorRT dialect, run by ONNX Runtime at given addresses.

With :class:`host_device.HostDevice` they run everything of the TensorRT stages but the calls that need a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
from host_device import HostDevice

from dspark_backend.stages.engine_contract import (
    CONTEXT_ENGINE,
    DRAFT_ENGINE,
    SAMPLER_ENGINE,
    VERIFIER_ENGINE,
    Profile,
    TensorSpec,
    Workload,
)
from dspark_backend.stages.engine_info import EngineInfo, ProfileInfo

_NUMPY = {"int64": "int64", "float32": "float32", "float16": "float16"}


class HostContext:
    """Implements ``Context``; refuses sizes beyond its profile as TensorRT does."""

    def __init__(self, engine: HostEngine, profile: Profile) -> None:
        self._engine = engine
        self._profile = profile
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.capturable = True

    def shape(self, name: str, shape: tuple[int, ...]) -> None:
        spec = self._engine.specs[name]
        for dim, size in zip(spec.dims, shape, strict=True):
            assert dim == size if isinstance(dim, int) else self._profile.ranges[dim].holds(size), (name, shape)
        self._shapes[name] = shape

    def address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def enqueue(self) -> None:
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        assert addresses.keys() == self._engine.specs.keys()
        self._engine.device.run(lambda: self._engine.compute(shapes, addresses))


class HostEngine:
    """Implements ``Engine``."""

    def __init__(
        self, device: HostDevice, graph: Path, specs: Sequence[TensorSpec], profiles: Sequence[Profile]
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.device = device
        self.specs = {spec.name: spec for spec in specs}
        self._profiles = profiles
        self.contexts = 0
        self.runs = 0

    def scratch_size(self) -> int:
        return 100

    def context(self, profile: int, scratch: int) -> HostContext:
        self.device.checked(scratch, 100)
        self.contexts += 1
        return HostContext(self, self._profiles[profile])

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        self.runs += 1
        feeds: dict[str, Any] = {}
        for name, shape in shapes.items():
            feeds[name] = self.device.array(addresses[name], shape, _NUMPY[self.specs[name].dtype])
        wanted = {one.name for one in self._session.get_inputs()}
        names = [one.name for one in self._session.get_outputs()]
        for name, result in zip(names, self._session.run(names, {key: feeds[key] for key in wanted}), strict=True):
            spec = self.specs[name]
            assert spec.alias is None or addresses[name] == addresses[spec.alias]
            self.device.array(addresses[name], result.shape, _NUMPY[spec.dtype])[...] = result


class HostOpener:
    """Implements ``EngineOpener``: profiles of a small workload, graphs instead of engines."""

    def __init__(self, device: HostDevice, slots: int = 10, prefill_chunk: int = 64, block_size: int = 7) -> None:
        self.device = device
        self.engines: dict[str, HostEngine] = {}
        self._settings = (slots, block_size, prefill_chunk)

    def check(self, info: EngineInfo | None, directory: Path) -> EngineInfo:
        assert info is not None
        work = Workload(info.capacity - info.padding, *self._settings)
        self.profiles = {
            VERIFIER_ENGINE: work.verifier_profiles(),
            SAMPLER_ENGINE: work.sampler_profiles(),
            DRAFT_ENGINE: work.draft_profiles(),
            CONTEXT_ENGINE: work.context_profiles(),
        }
        named = [
            ProfileInfo(
                engine, profile.name, {dim: (one.low, one.best, one.high) for dim, one in profile.ranges.items()}
            )
            for engine, profiles in self.profiles.items()
            for profile in profiles
        ]
        return replace(info, profiles=tuple(named))

    def engine(
        self, directory: Path, name: str, info: EngineInfo, specs: Sequence[TensorSpec], profiles: int
    ) -> HostEngine:
        assert profiles == len(self.profiles[name])
        graph = directory / name.replace(".engine", ".onnx")
        made = self.engines[name] = HostEngine(self.device, graph, specs, self.profiles[name])
        return made
