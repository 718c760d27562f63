"""Token embedding and LM head on a device: one copy for all stages of a process."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.artifact import TensorLocation
from dspark_backend.stages.batch import IntArray
from dspark_backend.stages.cuda.device import Device, Memory

_KINDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
_shared: weakref.WeakValueDictionary[tuple[int, Path, str, int], Memory] = weakref.WeakValueDictionary()
"""By device object and place in a file; an entry lives as long as a stage holds its memory."""


def shared_matrix(device: Device, directory: Path, location: TensorLocation, dtype: str) -> Memory:
    """The bytes of a tensor of an artifact, as they are stored; uploaded where no stage holds them yet.

    Raises:
        ArtifactError: it is not stored in ``dtype``, in which the engine computes.
    """
    if location.dtype != dtype:
        raise ArtifactError(
            f"{directory / location.file}: expected a matrix in {dtype}, as the engine computes, got {location.dtype}; "
            "export the verifier again"
        )
    key = (id(device), directory.resolve(), location.file, location.offset)
    memory = _shared.get(key)
    if memory is None:
        memory = _shared[key] = _uploaded(device, _raw(directory, location))
    return memory


def matrix_rows(device: Device, directory: Path, location: TensorLocation, rows: IntArray) -> Memory:
    """Some rows of a matrix, in this order."""
    return _uploaded(device, np.ascontiguousarray(_raw(directory, location)[rows]))


def _raw(directory: Path, location: TensorLocation) -> NDArray[np.uint16] | NDArray[np.uint32]:
    if location.dtype not in _KINDS:
        raise ArtifactError(f"{directory / location.file}: expected one of {', '.join(_KINDS)}, got {location.dtype!r}")
    return np.memmap(directory / location.file, _KINDS[location.dtype], "r", location.offset, location.shape)


def _uploaded(device: Device, array: NDArray[np.uint16] | NDArray[np.uint32]) -> Memory:
    memory = Memory(device, array.nbytes)
    device.upload(memory.address, array)
    # The file may be unmapped as soon as this returns.
    device.synchronize()
    return memory
