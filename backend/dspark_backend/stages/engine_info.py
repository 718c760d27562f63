"""What ``stage.json`` says of an artifact for TensorRT: how its graph was made, and the engines built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ProfileInfo:
    """An optimization profile of an engine: (least, best, most) for each symbol of ``engine_contract``."""

    engine: str
    """File of the engine."""
    name: str
    ranges: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class EngineInfo:
    """Empty ``builder`` and ``engines``: a graph for TensorRT, of which no engine was built yet."""

    capacity: int
    """Static length of the caches."""
    padding: int
    """How many positions of it lie beyond the context, for rows that nobody reads."""
    builder: str = ""
    """Package that built: tensorrt or tensorrt_rtx. An engine loads with that one alone."""
    version: str = ""
    """Of that package: an engine loads with no other."""
    precision: str = ""
    targets: tuple[str, ...] = ()
    """Compute capabilities it was built for, such as sm86; empty: the GPU of the machine that built it."""
    profiles: tuple[ProfileInfo, ...] = ()
    """Of all engines, in the order of their indices."""
    engines: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each engine, by its file."""
    reproducible: bool = False
    """Built in the way in which another build of the same graphs by the same package is, as a rule, the same bytes."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> EngineInfo:
        """From what JSON holds. Raises KeyError, TypeError or ValueError where it is not that."""
        profiles = tuple(
            ProfileInfo(
                str(one["engine"]),
                str(one["name"]),
                {str(symbol): _three(sizes) for symbol, sizes in one["ranges"].items()},
            )
            for one in raw["profiles"]
        )
        return cls(
            capacity=int(raw["capacity"]),
            padding=int(raw["padding"]),
            builder=str(raw["builder"]),
            version=str(raw["version"]),
            precision=str(raw["precision"]),
            targets=tuple(str(target) for target in raw["targets"]),
            profiles=profiles,
            engines={str(name): str(digest) for name, digest in raw["engines"].items()},
            reproducible=bool(raw.get("reproducible", False)),
        )


def _three(sizes: Any) -> tuple[int, int, int]:
    low, best, high = (int(size) for size in sizes)
    return low, best, high
