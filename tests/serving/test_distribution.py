from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_backend.errors import ConfigError
from dspark_backend.serving.distribution import (
    Distribution,
    cache_directory,
    find_distribution,
    server_environment,
)


def test_the_given_binary_wins() -> None:
    assert find_distribution(Path("/bin/true")).origin == "given"


@pytest.mark.parametrize("given", ["/etc/passwd", "/tmp", "/nowhere/tritonserver"])
def test_a_given_binary_must_be_executable(given: str) -> None:
    with pytest.raises(ConfigError, match="executable"):
        find_distribution(Path(given))


def test_the_one_on_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = find_distribution()
    assert found.origin in ("container", "path")
    if found.origin == "path":
        assert found.binary == binary


def test_the_wheel_gets_a_backends_folder_with_this_pythons_stub(distribution: Distribution) -> None:
    if distribution.origin != "wheel":
        pytest.skip("this machine has a Triton of its own")
    assert distribution.backend_directory is not None
    stub = distribution.backend_directory / "python" / "triton_python_backend_stub"
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in str(stub.resolve())
    # Loads all its libraries: it complains about arguments instead of ending with the loader's 127.
    code = subprocess.run([stub], env=server_environment(distribution), capture_output=True, check=False).returncode
    assert code != 127


def test_a_damaged_backends_folder_is_made_again(tmp_path: Path) -> None:
    first = find_distribution(cache=tmp_path)
    if first.origin != "wheel" or first.backend_directory is None:
        pytest.skip("this machine has a Triton of its own")
    (first.backend_directory / "python" / "libtriton_python.so").unlink()
    again = find_distribution(cache=tmp_path)
    assert again.backend_directory == first.backend_directory
    assert (first.backend_directory / "python" / "libtriton_python.so").exists()


def test_stubs_find_this_interpreters_packages() -> None:
    environment = server_environment(Distribution(Path("/x")), {"PATH": "/usr/bin", "PYTHONPATH": "/mine"})
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
    entries = environment["PYTHONPATH"].split(":")
    assert entries[-1] == "/mine"
    assert any((Path(entry) / "numpy").is_dir() for entry in entries)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_large_blocks_ask_for_huge_pages(before: dict[str, str], after: str) -> None:
    assert server_environment(Distribution(Path("/x")), before)["GLIBC_TUNABLES"] == after


def test_the_cache_follows_its_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DSPARK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "dspark"
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
