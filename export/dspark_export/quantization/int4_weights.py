"""The rounded matrices of an int4 export, on disk between the pass that makes them and the graph that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.stages.batch import FloatArray
from dspark_export.quantization.int4 import Int4Matrix
from dspark_export.quantization.plan import fused_parts
from dspark_export.weights import WeightSource


@dataclass(frozen=True)
class Int4Weights:
    """By the fused name of each product; a byte a weight in ``directory``."""

    directory: Path
    _files: dict[str, tuple[Path, np.dtype[Any]]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the products that were put, in that order."""
        return tuple(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def put(self, name: str, matrix: Int4Matrix) -> None:
        """Keep a product's matrix."""
        path = self.directory / f"{len(self._files)}.npz"
        # numpy's files know no bfloat16, which float32 holds exactly.
        np.savez(path, values=matrix.values, scales=matrix.scales.astype(np.float32))
        self._files[name] = path, matrix.scales.dtype

    def read(self, name: str) -> Int4Matrix:
        """Raises KeyError for a product that was not put."""
        path, dtype = self._files[name]
        with np.load(path) as arrays:
            return Int4Matrix(arrays["values"], arrays["scales"].astype(dtype))


@dataclass(frozen=True)
class RoundedSource:
    """Implements ``WeightSource``: a checkpoint in which some products have other weights."""

    original: WeightSource
    arrays: Mapping[str, FloatArray]
    """By tensor name."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.original.config

    @property
    def files(self) -> tuple[Path, ...]:
        return self.original.files

    def shape(self, name: str) -> tuple[int, ...]:
        return self.original.shape(name)

    def names(self) -> frozenset[str]:
        return self.original.names()

    def read(self, name: str) -> NDArray[Any]:
        return self.arrays[name] if name in self.arrays else self.original.read(name)


def split_matrix(name: str, matrix: FloatArray, weights: WeightSource) -> dict[str, FloatArray]:
    """A fused product's [K, N] as the checkpoint has it: tensors [width, K] by their names."""
    tensors = [f"{part}.weight" for part in fused_parts(name)]
    ends = np.cumsum([weights.shape(tensor)[0] for tensor in tensors])[:-1]
    return dict(zip(tensors, np.split(matrix.T, ends), strict=True))
