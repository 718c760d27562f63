"""A weight source that stands before another one, and finds its tensors under other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dspark_export.weights import WeightSource


class WrappedWeights:
    """Implements :class:`~dspark_export.weights.WeightSource` by another source; says the same unless overridden."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    @property
    def config(self) -> Mapping[str, Any]:
        return self._source.config

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def names(self) -> frozenset[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored_name(name))

    def read(self, name: str) -> NDArray[Any]:
        return self._source.read(self._stored_name(name))

    def _stored_name(self, name: str) -> str:
        """What the source behind it calls the tensor."""
        return name
