"""What a killed Triton leaves behind: Python stubs without a server and shared-memory regions without a user."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from dspark_backend.serving.distribution import STUB_NAME

log = logging.getLogger(__name__)

SHM_FOLDER = Path("/dev/shm")
REGION_PREFIX = "triton_python_backend_shm_region_"
PROC = Path("/proc")
YOUNG_SECS = 5.0


@dataclass(frozen=True)
class Cleanup:
    """What was removed."""

    stubs: tuple[int, ...]
    regions: tuple[str, ...]


def clean(grace_secs: float = 2.0, min_age_secs: float = YOUNG_SECS) -> Cleanup:
    """End orphan stubs (SIGTERM, then SIGKILL after ``grace_secs``) and remove regions that no process maps.

    Never touches what another live server uses: a stub is an orphan only when the server named in its arguments is no
    longer its parent, and a region is stale only when no process maps it and it is older than ``min_age_secs``.
    """
    stubs = orphan_stubs()
    for pid in stubs:
        log.warning("ending orphan Triton stub %d: its server is gone", pid)
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_secs
    while time.monotonic() < deadline and any(_running(pid) for pid in stubs):
        time.sleep(0.05)
    for pid in set(stubs) & set(orphan_stubs()):
        _signal(pid, signal.SIGKILL)
        _wait_gone(pid, 2.0)
    return Cleanup(stubs, remove_stale_regions(min_age_secs))


def orphan_stubs() -> tuple[int, ...]:
    """Process ids of this user's stubs whose server died.

    A stub's arguments are: model, region, sizes (two), server pid, backend folder, ... The region's argument tells
    where the pid stands. Stubs in another PID namespace (a container's) are left alone: pids differ there.
    """
    own_namespace = _namespace("self")
    found = []
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(arguments[0]).name != STUB_NAME or _namespace(folder.name) != own_namespace:
                continue
            server = declared_server(arguments)
            if server is not None and _parent(folder) != server and folder.stat().st_uid == os.geteuid():
                found.append(int(folder.name))
        except OSError:  # ended meanwhile, or not ours to read
            continue
    return tuple(sorted(found))


def declared_server(arguments: list[str]) -> int | None:
    """The server's pid in a stub's command line, or None where the line has another form."""
    for index, argument in enumerate(arguments):
        if REGION_PREFIX in argument:
            rest = arguments[index + 1 : index + 4]
            return int(rest[2]) if len(rest) == 3 and all(value.isdigit() for value in rest) else None
    return None


def remove_stale_regions(min_age_secs: float = YOUNG_SECS) -> tuple[str, ...]:
    """Remove this user's regions that no process maps; returns their names."""
    now = time.time()
    candidates = []
    for path in SHM_FOLDER.glob(f"{REGION_PREFIX}*"):
        try:
            state = path.stat()
        except OSError:
            continue
        # A region exists for an instant before its server maps it: leave young ones to the next start.
        if state.st_uid == os.geteuid() and now - state.st_mtime >= min_age_secs:
            candidates.append(path)
    if not candidates:
        return ()
    used = mapped_regions()
    removed = []
    for path in candidates:
        if path.name not in used:
            path.unlink(missing_ok=True)
            removed.append(path.name)
    if removed:
        log.warning("removed %d stale shared-memory regions of a Triton that was killed", len(removed))
    return tuple(removed)


def mapped_regions() -> frozenset[str]:
    """Names of the regions that some process maps or names in its arguments."""
    names: set[str] = set()
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        for file in ("maps", "cmdline"):
            try:
                text = (folder / file).read_bytes()
            except OSError:
                continue
            names.update(_region_names(text.decode(errors="replace")))
    return frozenset(names)


def _region_names(text: str) -> set[str]:
    pieces = text.split(REGION_PREFIX)[1:]
    return {REGION_PREFIX + piece.split("\0")[0].split()[0] for piece in pieces if piece.strip("\0 \n")}


def _namespace(pid: str) -> str:
    return str((PROC / pid / "ns" / "pid").readlink())


def _parent(folder: Path) -> int:
    # The command's name, in parentheses, may hold spaces; the parent is the second field after it.
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def _running(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_gone(pid: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and _running(pid):
        time.sleep(0.02)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        log.warning("cannot signal orphan stub %d: it belongs to another user", pid)
