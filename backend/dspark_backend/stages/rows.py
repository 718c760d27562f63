"""Rows of numbers that may stay where a runtime has them: in numpy, or on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]


class RemoteRows(Protocol):
    """Float32 rows [n, width] on a device. They are fetched where one reads them, and not before."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, place: int) -> FloatArray: ...

    @overload
    def __getitem__(self, place: slice) -> RemoteRows: ...

    def copy(self) -> RemoteRows:
        """The same rows in memory of their own, on the device."""

    def join(self, others: Sequence[RemoteRows]) -> RemoteRows:
        """These rows, then those of others on the same device; nothing is copied."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...


Rows: TypeAlias = FloatArray | RemoteRows
"""float32 [n, width]. ``len``, indexing by a number or a slice, ``copy`` and ``np.asarray`` work on either."""


def joined(parts: Sequence[Rows]) -> Rows:
    """At least one part, all of one kind and width, behind each other."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    remote = [part for part in parts if not isinstance(part, np.ndarray)]
    if len(remote) != len(parts):
        raise TypeError("rows: expected all parts in host memory or all on a device, got some of each")
    return remote[0].join(remote[1:])
