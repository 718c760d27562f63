"""A Hugging Face folder: config.json and one or more safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dspark_export.errors import ExportError

_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "BOOL")
"""The last three for vocabulary tables (d2t, t2d)."""


class SafetensorsFolder:
    """Weights of a Hugging Face folder. Only the shard of the tensor being read is open.

    Raises:
        ExportError: config.json or the weights are missing, or a shard named by the index is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise ExportError(f"{folder}: expected a Hugging Face folder with config.json, found none")
        try:
            self._config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExportError(f"{config_file}: expected JSON, got {error}") from error
        if not isinstance(self._config, dict):
            raise ExportError(f"{config_file}: expected a JSON object, got {type(self._config).__name__}")

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """Tensor -> shard as the index says; empty without an index."""
        index = self._folder / _INDEX
        if not index.is_file():
            return {}
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{index}: expected JSON with a weight_map, got {error!r}; download it again") from error

    @cached_property
    def _shards(self) -> tuple[Path, ...]:
        if self._weight_map:
            shards = tuple(self._folder / name for name in sorted(set(self._weight_map.values())))
        else:
            shards = tuple(sorted(self._folder.glob("*.safetensors")))
        if not shards:
            raise ExportError(f"{self._folder}: expected *.safetensors files, found none")
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ExportError(
                f"{self._folder}: {_INDEX} names {', '.join(missing)}, which is missing; download it again"
            )
        return shards

    @cached_property
    def _location(self) -> dict[str, tuple[Path, tuple[int, ...], str]]:
        location = {}
        for shard in self._shards:
            try:
                with safe_open(shard, framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                        stored = tensors.get_slice(name)
                        location[name] = (shard, tuple(stored.get_shape()), stored.get_dtype())
            except SafetensorError as error:
                raise ExportError(f"{shard}: not a complete safetensors file ({error}); download it again") from error
        absent = sorted(set(self._weight_map) - set(location))
        if absent:
            raise ExportError(
                f"{self._folder}: {_INDEX} names {absent[0]}{f' and {len(absent) - 1} more' if absent[1:] else ''} in "
                f"{self._weight_map[absent[0]]}, which no shard holds; download it again"
            )
        return location

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._folder / "config.json", *self._shards)

    def names(self) -> frozenset[str]:
        return frozenset(self._location)

    def _find(self, name: str) -> tuple[Path, tuple[int, ...], str]:
        if name not in self._location:
            raise ExportError(f"{self._folder}: expected the tensor {name}, which no shard holds")
        return self._location[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1]

    def read(self, name: str) -> NDArray[Any]:
        shard, _, dtype = self._find(name)
        if dtype not in _DTYPES:
            raise ExportError(
                f"{shard}: expected {name} in one of {', '.join(_DTYPES)}, got {dtype}; quantised checkpoints are not "
                "supported, export the original one"
            )
        with safe_open(shard, framework="numpy") as tensors:
            return np.asarray(tensors.get_tensor(name))
