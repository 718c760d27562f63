"""What the stages of both models do alike with their slot cache on the device."""

from __future__ import annotations

from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.cuda.device import Device
from dspark_backend.stages.tensorrt.cache import EngineCache


class SlotStage:
    """The part of a TensorRT stage that knows its device and its cache, and nothing of its engines."""

    _device: Device
    _cache: EngineCache

    @property
    def lazy_memory(self) -> bool:
        return False

    def copy_rows(self, move: RowMove) -> None:
        self._device.use()
        self._cache.copy_rows(move)

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self._device.use()
        self._cache.clear_rows(slot, first)
