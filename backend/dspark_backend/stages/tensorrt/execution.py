"""One engine with its buffers: fill host arrays, run, read results. Owns all memory but caches and shared weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.cuda.device import Device, Memory
from dspark_backend.stages.engine_contract import Profile, TensorSpec
from dspark_backend.stages.tensorrt.engine_file import Context, Engine
from dspark_backend.stages.tensorrt.graphs import GraphCache, GraphKey
from dspark_backend.stages.tensorrt.plan import BufferPlan
from dspark_backend.stages.tensorrt.profiles import Choice

_MAX_GRAPHS = 48
_RESIDENT = "key_positions"
"""0, 1, 2, ...: written once."""


@dataclass(frozen=True)
class _Captured:
    graph: int
    context: Context
    """Stays as it was captured: a graph of a context that changed is undefined."""


class Execution:
    """An engine ready to run. Single-threaded."""

    def __init__(
        self,
        device: Device,
        engine: Engine,
        specs: Sequence[TensorSpec],
        profiles: Sequence[Profile],
        elsewhere: Sequence[str],
        max_graphs: int = _MAX_GRAPHS,
    ) -> None:
        self._device = device
        self._engine = engine
        self._specs = tuple(specs)
        self.profiles = tuple(profiles)
        self._plan = BufferPlan.of(specs, profiles, elsewhere)
        self._memory = Memory(device, max(1, self._plan.total))
        # Padded tokens read what no step has written yet.
        device.zero(self._memory.address, self._plan.total)
        self._host = device.pinned(self._plan.total)
        self._scratch = Memory(device, max(1, engine.scratch_size()))
        self._contexts: dict[int, Context] = {}
        self.graphs: GraphCache[_Captured] = GraphCache(max_graphs, lambda captured: device.destroy(captured.graph))
        self._in_flight = False
        """Whether the device may still read the pinned arrays."""
        if _RESIDENT in self._plan.regions:
            region = self._plan.regions[_RESIDENT]
            device.upload(self.device_address(_RESIDENT), np.arange(region.size // 8, dtype=np.int64))
            device.synchronize()

    def device_address(self, name: str) -> int:
        """Of a tensor in the plan."""
        return self._memory.address + self._plan.regions[name].offset

    @property
    def memory(self) -> Memory:
        """The block that holds all of them."""
        return self._memory

    def offset(self, name: str) -> int:
        """Bytes from the beginning of ``memory``."""
        return self._plan.regions[name].offset

    def inputs(self, choice: Choice, skip: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """The host arrays of all small inputs but those to ``skip``, for the caller to fill."""
        if self._in_flight:
            self._device.synchronize()
            self._in_flight = False
        return {
            name: self._array(name, region.spec.shape(choice.sizes))
            for name, region in self._plan.regions.items()
            if region.spec.direction == "input" and name != _RESIDENT and name not in skip
        }

    def run(
        self, choice: Choice, arrays: Mapping[str, NDArray[Any]], bound: Mapping[str, int], first: int, capture: bool
    ) -> None:
        """Enqueue the uploads of ``arrays`` and a run. ``bound`` are the addresses of caches and shared weights.

        ``first`` is the slot where the view of the caches begins; ``capture`` allows a CUDA graph.
        """
        for name, array in arrays.items():
            self._device.upload(self.device_address(name), array)
        self._in_flight = True
        key = GraphKey.of(choice.index, choice.sizes, first)
        captured = self.graphs.get(key) if capture else None
        if captured is not None:
            self._device.launch(captured.graph)
            return
        if not (capture and self.graphs.worth_capturing(key)):
            self._bind(self._shared_context(choice.index), choice, bound).enqueue()
            return
        context = self._bind(self._engine.context(choice.index, self._scratch.address), choice, bound)
        # A context does work of its own at the first run with new shapes, which must not be part of a graph.
        context.enqueue()
        if context.capturable:
            self.graphs.put(key, _Captured(self._device.capture(context.enqueue), context))

    def results(self, choice: Choice, names: Sequence[str]) -> list[NDArray[Any]]:
        """Small outputs of the run, of its rounded sizes: views that the next call overwrites. Waits for the device."""
        found = [self._array(name, self._plan.regions[name].spec.shape(choice.sizes)) for name in names]
        for name, array in zip(names, found, strict=True):
            self._device.download(array, self.device_address(name))
        self._device.synchronize()
        self._in_flight = False
        return found

    def forget_addresses(self) -> None:
        """Caches have moved: no graph holds any more."""
        self._device.synchronize()
        self.graphs.clear()

    def close(self) -> None:
        """Give memory and graphs back."""
        self.forget_addresses()
        self._contexts.clear()
        self._scratch.release()
        self._memory.release()

    def _array(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        region = self._plan.regions[name]
        size = math.prod(shape) * np.dtype(region.dtype).itemsize
        return self._host[region.offset : region.offset + size].view(region.dtype).reshape(shape)

    def _shared_context(self, profile: int) -> Context:
        if profile not in self._contexts:
            self._contexts[profile] = self._engine.context(profile, self._scratch.address)
        return self._contexts[profile]

    def _bind(self, context: Context, choice: Choice, bound: Mapping[str, int]) -> Context:
        for spec in self._specs:
            place = bound.get(spec.alias or spec.name)
            context.address(spec.name, self.device_address(spec.name) if place is None else place)
            if spec.direction == "input":
                context.shape(spec.name, spec.shape(choice.sizes))
        return context
