"""Shapes of a graph's inputs for an optimization profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from dspark_backend.stages.engine_contract import Profile

Dims = tuple[int | str, ...]


def input_dims(graph: Path) -> dict[str, Dims]:
    """Dimensions of every input that varies; strings are symbols. Weights are not read."""
    model = onnx.load(graph, load_external_data=False)
    found = {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }
    return {name: dims for name, dims in found.items() if any(isinstance(dim, str) for dim in dims)}


def profile_shapes(dims: Mapping[str, Dims], profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """(least, best, most) shape of each input."""
    return {
        name: tuple(
            tuple(getattr(profile.ranges[dim], end) if isinstance(dim, str) else dim for dim in shape)
            for end in ("low", "best", "high")
        )
        for name, shape in dims.items()
    }
