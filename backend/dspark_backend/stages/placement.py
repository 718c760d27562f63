"""Where an ONNX Runtime stage keeps its cache and its rows: host memory, or a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnxruntime as ort

from dspark_backend.stages.binding import CpuBinding
from dspark_backend.stages.cuda.binding import DeviceBinding, DeviceCache
from dspark_backend.stages.cuda.device import Device, open_cuda
from dspark_backend.stages.providers import check_available
from dspark_backend.stages.settings import StageSettings
from dspark_backend.stages.slot_arrays import SlotArrays


@dataclass(frozen=True)
class Placement:
    """Makes the parts of a stage that differ between host and device."""

    device: Device | None = None
    """None: numpy arrays."""

    @classmethod
    def of(cls, settings: StageSettings) -> Placement:
        """Raises ConfigError where the provider is not installed or there is no such device."""
        if not settings.on_device:
            return cls()
        check_available(settings.provider)
        return cls(open_cuda(settings.device))

    def binding(self, session: ort.InferenceSession) -> CpuBinding:
        """The session with what is bound to it."""
        return CpuBinding(session) if self.device is None else DeviceBinding(session, self.device)

    def cache(self, shapes: Sequence[tuple[int, int]]) -> SlotArrays | DeviceCache:
        """An empty cache; ``shapes`` are (heads, channels) of every layer."""
        return SlotArrays(shapes) if self.device is None else DeviceCache(self.device, shapes)
