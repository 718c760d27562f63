"""Denormal numbers as zero on the calling thread, as long as a graph runs.

A processor takes some hundred cycles for a product whose factor or result is denormal. Softmax makes many: the
exponential of a masked score is 4e-39 before it becomes 0, and so are the weights of keys whose score is 87 below the
best. Over 8 requests of 4 tokens, a quarter of the cache masked, ONNX Runtime's Softmax took 2.8 times as long as
without masks, and scores 87 below the best made the product with the values 12 times as long.

``session.set_denormal_as_zero`` does it for a session's own threads only; for the caller's, which computes a share too,
at most once a process. Both are needed, never one alone: a row's bits would depend on the thread that computed it.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from dspark_backend.stages.processor import is_x86_64

_WORDS = 8
"""32-bit words of a ``fenv_t`` of glibc on x86-64; the last is MXCSR."""
_FLUSH = 0x8000 | 0x0040
"""Of MXCSR: denormal results are zero, denormal operands are zero."""


@cache
def _libm() -> ctypes.CDLL | None:
    if not is_x86_64() or platform.libc_ver()[0] != "glibc":
        return None
    try:
        return ctypes.CDLL("libm.so.6")
    except OSError:
        return None


def can_flush_denormals() -> bool:
    """Whether :func:`denormals_flushed` has any effect: on x86-64 with glibc."""
    return _libm() is not None


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Denormals are zero on this thread inside the block; afterwards they are what they were before."""
    libm = _libm()
    if libm is None:
        yield
        return
    before = (ctypes.c_uint32 * _WORDS)()
    libm.fegetenv(before)
    inside = (ctypes.c_uint32 * _WORDS)(*before)
    inside[-1] |= _FLUSH
    libm.fesetenv(inside)
    try:
        yield
    finally:
        libm.fesetenv(before)
