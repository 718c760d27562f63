"""File locks: one start at a time prepares the cache, and nobody prunes what a server uses. Standard library only."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from console import QuickstartError, say


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` alone; waits for another holder and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not _try_lock(file, fcntl.LOCK_EX):
            say("  another start prepares the same cache: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def sole(path: Path, complaint: str) -> Iterator[None]:
    """Hold ``path`` alone, without waiting.

    Raises:
        QuickstartError: ``complaint``, if somebody else holds it.
    """
    with path.open("a") as file:
        if not _try_lock(file, fcntl.LOCK_EX):
            raise QuickstartError(complaint)
        yield


def share(path: Path) -> IO[str]:
    """Mark ``path`` as used until the returned file, and every copy that a child inherits, is closed."""
    file = path.open("a")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def unused(path: Path) -> bool:
    """Does nobody hold ``path``?"""
    with path.open("a") as file:
        return _try_lock(file, fcntl.LOCK_EX)


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
