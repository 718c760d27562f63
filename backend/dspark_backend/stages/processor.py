"""What the processor can do, as far as it decides how sessions run."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Instructions that multiply unsigned with signed bytes and add in 32 bits."""


@cache
def processor_flags() -> frozenset[str]:
    """Flags of the first processor as Linux names them; empty where it does not say."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())


def is_x86_64() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def int8_saturates() -> bool:
    """Whether ONNX Runtime's fast product of unsigned and signed bytes adds pairs in 16 bits, where they may overflow.

    So it does on x86-64 without VNNI or AMX.
    """
    return is_x86_64() and not processor_flags() & _EXACT
