"""Where a Triton comes from, and the environment in which its Python backend finds this interpreter's packages."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dspark_backend.errors import ConfigError

CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
STUB_NAME = "triton_python_backend_stub"
_HUGE_PAGES = "glibc.malloc.hugetlb"


@dataclass(frozen=True)
class Distribution:
    """A Triton that can be started."""

    binary: Path
    backend_directory: Path | None = None
    """None leaves Triton's own default."""
    library_path: tuple[Path, ...] = ()
    """Goes before ``LD_LIBRARY_PATH``."""
    origin: str = "given"
    """``given``, ``container``, ``path`` or ``wheel``."""


def cache_directory() -> Path:
    """``$DSPARK_CACHE``, else ``$XDG_CACHE_HOME/dspark``, else ``~/.cache/dspark``."""
    if given := os.environ.get("DSPARK_CACHE"):
        return Path(given).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "dspark"


def find_distribution(given: Path | None = None, cache: Path | None = None) -> Distribution:
    """The Triton to start: the given binary, the container's, the one on PATH, or the nvidia-pytriton wheel's.

    Raises:
        ConfigError: the given binary is not executable, or there is no Triton at all.
    """
    if given is not None:
        if not os.access(given, os.X_OK) or given.is_dir():
            raise ConfigError(f"--tritonserver: expected an executable file, got {given}")
        return Distribution(given.resolve(), origin="given")
    if os.access(CONTAINER_BINARY, os.X_OK):
        return Distribution(CONTAINER_BINARY, origin="container")
    if on_path := shutil.which("tritonserver"):
        return Distribution(Path(on_path).resolve(), origin="path")
    if wheel := _wheel_root():
        return wheel_distribution(wheel, cache or cache_directory())
    raise ConfigError(
        "no Triton Inference Server found: expected /opt/tritonserver (NVIDIA's container), tritonserver on PATH, or "
        "the wheel nvidia-pytriton in this environment; install the extra with pip install 'dspark-triton[serve]' or "
        "name the binary with --tritonserver"
    )


def _wheel_root() -> Path | None:
    # find_spec of a top-level package runs none of its code; importing pytriton takes seconds.
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def wheel_distribution(root: Path, cache: Path) -> Distribution:
    """The wheel's server, with a backends folder in ``cache`` that holds the stub of this Python version.

    Args:
        root: folder of the package ``pytriton``.

    Raises:
        ConfigError: the wheel has no stub for this Python, or the stub cannot be loaded here.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "tritonserver" / "python_backend_stubs" / version / STUB_NAME
    if not stub.is_file():
        offered = ", ".join(sorted(path.parent.name for path in stub.parent.parent.glob(f"*/{STUB_NAME}"))) or "none"
        raise ConfigError(f"the Triton wheel serves no Python {version}; it has stubs for: {offered}")
    distribution = Distribution(
        binary=root / "tritonserver" / "bin" / "tritonserver",
        backend_directory=_link_backends(root / "tritonserver" / "backends" / "python", stub, cache / "triton"),
        library_path=(root.parent / "nvidia_pytriton.libs", *_interpreter_libraries()),
        origin="wheel",
    )
    _check_stub(stub, server_environment(distribution))
    return distribution


def _interpreter_libraries() -> tuple[Path, ...]:
    folder, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    return (Path(folder),) if folder and name and (Path(folder) / name).exists() else ()


def _link_backends(python_backend: Path, stub: Path, cache: Path) -> Path:
    files = {path.name: path for path in sorted(python_backend.iterdir()) if path.is_file()} | {STUB_NAME: stub}
    key = hashlib.sha256("\n".join(f"{name}={path}" for name, path in files.items()).encode()).hexdigest()[:16]
    target = cache / f"backends-{key}"
    if not all((target / "python" / name).exists() for name in files):
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="backends-", dir=cache))
        (fresh / "python").mkdir()
        for name, path in files.items():
            (fresh / "python" / name).symlink_to(path)
        fresh.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        try:
            fresh.rename(target)
        except OSError:  # another start made the same folder in between
            shutil.rmtree(fresh)
    return target


def _check_stub(stub: Path, environment: Mapping[str, str]) -> None:
    # Without arguments the stub ends at once; 127 is the dynamic loader's code for a missing library.
    ended = subprocess.run([stub], env=environment, capture_output=True, text=True, timeout=30, check=False)
    if ended.returncode == 127:
        name = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
        raise ConfigError(
            f"Triton's Python backend cannot start here: {ended.stderr.strip()}. On Debian and Ubuntu: "
            f"apt install {name}; elsewhere use a Python built with a shared library ({name}.so)"
        )


def server_environment(distribution: Distribution, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for the server, whose stubs embed Python and must find this interpreter's packages.

    ``PATH`` starts with this interpreter's folder, where the embedded Python looks for its home (so a venv works); the
    wheel's stub is isolated and sees nothing else. ``PYTHONPATH`` names this interpreter's package folders, for stubs
    that read it. ``GLIBC_TUNABLES`` asks for huge pages behind large blocks of memory, unless it says something about
    them already: a step reads all weights, and took 5 to 10% less time (SmolLM2 in int8, one request, where Linux gives
    huge pages to those who ask for them, its default).

    Args:
        base: variables to start from; this process's by default.
    """
    environment = dict(os.environ if base is None else base)
    packages = [entry for entry in sys.path if entry and _holds_packages(Path(entry))]
    _prepend(environment, "PATH", [str(Path(sys.executable).parent)])
    _prepend(environment, "PYTHONPATH", packages)
    _prepend(environment, "LD_LIBRARY_PATH", [str(path) for path in distribution.library_path])
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables:
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_HUGE_PAGES}=1"]))
    return environment


def _holds_packages(folder: Path) -> bool:
    if folder.name in ("site-packages", "dist-packages"):
        return True
    # An editable install puts its source folders on sys.path.
    return any((folder / name).is_dir() for name in ("dspark_backend", "dspark_client", "dspark_export"))


def _prepend(environment: dict[str, str], name: str, entries: list[str]) -> None:
    present = [entry for entry in environment.get(name, "").split(os.pathsep) if entry]
    merged = list(dict.fromkeys([*entries, *present]))
    if merged:
        environment[name] = os.pathsep.join(merged)
