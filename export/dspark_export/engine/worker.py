"""Builds one engine in a process of its own, so that the same graph gives the same bytes.

The builder orders some of its tables by the addresses of their entries, and works in several threads. So the process
is a :mod:`dspark_export.engine.settled` one, with a heap for every thread, so that the addresses in one do not depend
on how far the others are, and a limit for allocations outside of them that stays what it is. The build has such a
thread too: what Python did before (it compiles modules once, say) is in another heap. The job comes through stdin,
with paths relative to the graph's folder, and the engine's own path is read after the build.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dspark_backend.stages.engine_contract import Profile, Range
from dspark_export.engine import settled
from dspark_export.engine.builder import Builder, BuildSettings, build_engine
from dspark_export.errors import ExportError

_HEAPS = {"MALLOC_ARENA_MAX": "64", "MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
_KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HOME")


def build_apart(
    builder: Builder,
    graph: Path,
    profiles: Sequence[Profile],
    settings: BuildSettings,
    engine: Path,
    progress: Callable[[float], None],
) -> tuple[str, ...]:
    """As :func:`build_engine`, into the file ``engine``. Returns what the system denied of what makes builds the same.

    Raises:
        ExportError: as ``build_engine`` does, or where the process dies.
    """
    job = {
        "package": builder.package,
        "graph": graph.name,
        "profiles": [asdict(profile) for profile in profiles],
        "targets": settings.targets,
        "workspace": settings.workspace,
        "timing_cache": str(settings.timing_cache.resolve()) if settings.timing_cache else None,
    }
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= _HEAPS | {"PYTHONHASHSEED": "0"}
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            [sys.executable, "-m", settled.__name__, __spec__.name],
            cwd=graph.parent, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        failure, missing = None, ()
        with suppress(BrokenPipeError):
            process.stdin.write(f"{json.dumps(job)}\n{engine.resolve()}\n")
            process.stdin.close()
        try:
            for line in process.stdout:
                kind, _, text = line.strip().partition(" ")
                if kind == "progress":
                    progress(float(text))
                elif kind == "error":
                    failure = json.loads(text)
                elif kind == "missing":
                    missing = tuple(json.loads(text))
        except BaseException:
            process.kill()  # an interrupted command would wait for the whole build
            raise
        code = process.wait()
        if failure is None and code:
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or ["it gives no reason"])[-1]
            failure = f"{graph}: the build stopped with exit code {code}: {last}"
    if failure is not None:
        raise ExportError(failure)
    return missing


def main() -> None:
    """The process: a job on stdin, progress and errors on stdout."""
    sys.stdout.write(f"missing {json.dumps(settled.missing())}\n")
    job = json.loads(sys.stdin.readline())
    profiles = [
        Profile(one["name"], {symbol: Range(**sizes) for symbol, sizes in one["ranges"].items()})
        for one in job["profiles"]
    ]
    cache = Path(job["timing_cache"]) if job["timing_cache"] else None
    settings = BuildSettings(tuple(job["targets"]), job["workspace"], cache)
    builder = Builder(job["package"], importlib.import_module(job["package"]))

    def progress(done: float) -> None:
        sys.stdout.write(f"progress {done}\n")
        sys.stdout.flush()

    try:
        with ThreadPoolExecutor(1) as pool:
            data = pool.submit(build_engine, builder, Path(job["graph"]), profiles, settings, progress).result()
    except ExportError as error:
        sys.stdout.write(f"error {json.dumps(str(error))}\n")
        sys.exit(1)
    Path(sys.stdin.readline().strip()).write_bytes(data)


if __name__ == "__main__":
    main()
