"""GPUs that a plan can name, what each generation computes in, and sizes of memory in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dspark_export.errors import ExportError

_FIRST = {"float16": 0, "bfloat16": 80, "fp8": 89, "int4": 80}
"""Compute capability from which engines compute in a dtype; between int4's products there is bfloat16."""

GIB = 2**30
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB)?", re.IGNORECASE)
_UNITS = {"gib": GIB, "gb": 10**9, "g": GIB, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class Gpu:
    """A device's memory, and what it can compute in."""

    name: str
    memory: int
    """Bytes."""
    compute_capability: int | None
    """89 for SM89; None where only a size is known."""


_GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("T4", 16 * GIB, 75),
        Gpu("A10", 24 * GIB, 86),
        Gpu("A100-40GB", 40 * GIB, 80),
        Gpu("A100-80GB", 80 * GIB, 80),
        Gpu("L4", 24 * GIB, 89),
        Gpu("L40S", 48 * GIB, 89),
        Gpu("H100", 80 * GIB, 90),
        Gpu("H200", 141 * GIB, 90),
        Gpu("RTX3090", 24 * GIB, 86),
        Gpu("RTX4090", 24 * GIB, 89),
        Gpu("RTX5090", 32 * GIB, 120),
    )
}


def find_gpu(text: str) -> Gpu:
    """The GPU of a name such as ``L4``, or one of a size such as ``24GiB`` (a bare number counts GiB).

    Raises:
        ExportError: neither.
    """
    known = _GPUS.get(re.sub(r"[\s_]", "", text).lower())
    if known is not None:
        return known
    size = _SIZE.fullmatch(text.strip())
    if size is None or float(size[1]) == 0:
        names = ", ".join(gpu.name for gpu in _GPUS.values())
        raise ExportError(f"--gpu: expected a size such as 24GiB or one of {names}, got {text!r}")
    return Gpu(text.strip(), int(float(size[1]) * _UNITS[(size[2] or "GiB").lower()]), None)


def first_capability(precision: str) -> int:
    """Least compute capability for a stage of this dtype, 0 where any will do."""
    return _FIRST.get(precision, 0)


def check_capability(option: str, precision: str, gpu: str, capability: int) -> None:
    """Raises ExportError, in the name of ``option``, where the GPU cannot compute in this precision."""
    least = first_capability(precision)
    if capability >= least:
        return
    *most, last = [other for other, first in _FIRST.items() if capability >= first]
    others = f"{', '.join(most)} or {last}" if most else last
    raise ExportError(f"{option}: {precision} needs a GPU from SM{least} on, got {gpu}; export with --dtype {others}")
