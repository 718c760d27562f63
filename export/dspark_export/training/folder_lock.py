"""Who writes in a folder, a corpus or a run: one process at a time, known by a lock that ends with it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from dspark_export.training.generate import Stopped

_POLL_SECONDS = 2.0


class FolderLock:
    """An advisory lock on a folder. Released when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """``path``: a file of the folder. It stays there and holds the process id of its last owner."""
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Whether it is ours now, or was before; never waits."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        return True

    def wait(self, there: Callable[[], bool], stop: Callable[[], bool], tell: Callable[[], None]) -> bool:
        """Wait until the lock is ours (true) or what another process makes is ``there`` (false).

        Raises:
            Stopped: ``stop`` said so before.
        """
        while not there():
            if self.acquire():
                # Its last owner may have finished in between.
                return not there()
            if stop():
                raise Stopped
            tell()
            time.sleep(_POLL_SECONDS)
        return False

    def release(self) -> None:
        """Let another process have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
