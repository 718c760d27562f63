"""The caches of an engine on the device: slots of one static length, by the names that the engine gives them."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_backend.errors import ConfigError
from dspark_backend.stages.batch import RowMove
from dspark_backend.stages.cuda.device import Device
from dspark_backend.stages.cuda.slots import CacheLayout, DeviceSlots
from dspark_backend.stages.engine_contract import Profile
from dspark_backend.stages.tensorrt.plan import ITEM_BYTES


class EngineCache:
    """Grows with the number of slots; their length is the engine's."""

    def __init__(
        self, device: Device, shapes: Sequence[tuple[int, int]], capacity: int, dtype: str, profiles: Sequence[Profile]
    ) -> None:
        item = ITEM_BYTES[dtype]
        layouts = [CacheLayout(heads, capacity, head_dim, item) for heads, head_dim in shapes for _ in range(2)]
        self._layouts = layouts
        self._slots = DeviceSlots(device, ())
        self._most = min(profile.ranges["R"].high for profile in profiles)
        self.names = tuple(f"{kind}_cache_{layer}" for layer in range(len(shapes)) for kind in ("key", "value"))
        self.capacity = capacity

    @property
    def num_slots(self) -> int:
        return self._slots.num_slots

    def allocate(self, num_slots: int, moves: Sequence[RowMove]) -> bool:
        """Room for so many slots, where the rows that ``moves`` names survive. Whether addresses have changed.

        Raises:
            ConfigError: the engine was built for fewer.
        """
        if num_slots > self._most:
            raise ConfigError(
                f"max_slots: expected at most {self._most}, for which the engines were built, got {num_slots}; lower "
                "it or build them for more"
            )
        if num_slots > self.num_slots:
            self._slots.reallocate(num_slots, self._layouts, moves)
            return True
        self._slots.permute(moves)
        return False

    def addresses(self, first: int) -> dict[str, int]:
        """Of slot ``first`` in every cache, by name."""
        return dict(zip(self.names, self._slots.addresses(first), strict=True))

    def copy_rows(self, move: RowMove) -> None:
        self._slots.copy_rows(move)

    def clear_rows(self, slot: int, first: int = 0) -> None:
        self._slots.clear_rows(slot, first)

    def clear(self) -> None:
        """Give the memory back."""
        self._slots.clear()
