"""Where every small input and output of an engine lies: one block of device memory, one of pinned host memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from dspark_backend.stages.engine_contract import Profile, TensorSpec

ALIGNMENT = 256
"""Bytes; TensorRT wants it of addresses."""

ITEM_BYTES: Mapping[str, int] = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_NUMPY: Mapping[str, DTypeLike] = {"int64": np.int64, "float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Region:
    """The place of one tensor at its largest."""

    spec: TensorSpec
    offset: int
    size: int
    """Bytes."""

    @property
    def dtype(self) -> DTypeLike:
        """In host memory. Raises KeyError for bfloat16, which numpy has not."""
        return _NUMPY[self.spec.dtype]


@dataclass(frozen=True)
class BufferPlan:
    """Regions by name, none over another, each aligned."""

    regions: Mapping[str, Region]
    total: int
    """Bytes."""

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], profiles: Sequence[Profile], elsewhere: Sequence[str]) -> BufferPlan:
        """For all tensors but those ``elsewhere`` (caches, shared weights) and outputs that alias an input."""
        regions: dict[str, Region] = {}
        end = 0
        for spec in specs:
            if spec.alias is not None or spec.name in elsewhere:
                continue
            size = max(math.prod(spec.shape(_highest(profile, spec))) for profile in profiles) * ITEM_BYTES[spec.dtype]
            regions[spec.name] = Region(spec, end, size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(regions, end)


def _highest(profile: Profile, spec: TensorSpec) -> dict[str, int]:
    return {dim: profile.ranges[dim].high for dim in spec.dims if isinstance(dim, str)}
