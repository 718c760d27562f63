"""Order of the whole suite (fast tests first, then slow ones, then those with a server), and exported models.

With ``-n 2`` two processes share them (sharing.py).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import artifacts
import pytest
from first_start import FirstStart
from hypothesis import settings
from tiny_text_model import write_text_model

# How long an example takes says nothing where other processes use the machine.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

SERVERS = ("tests/server/", "tests/serving/", "tests/deploy/test_load_run.py", "tests/deploy/test_quickstart.py")
"""What starts servers looks at what servers leave on the machine, so one process has all of it."""
_FIRST_START = pytest.StashKey[FirstStart]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        # Two processes with two spinning threads each are slower than two with one.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from sharing import SharedScheduling  # xdist is only needed for -n

    return SharedScheduling(config, log, SERVERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    strays = {item.nodeid for item in items if _cost(item) == 2 and not item.nodeid.startswith(SERVERS)}
    if strays:
        raise pytest.UsageError(f"expected tests that need a server in one of {SERVERS}, got {sorted(strays)}")
    items.sort(key=_cost)  # stable: what shares a fixture stays together


def _cost(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("server") else 1 if item.get_closest_marker("slow") else 0


def pytest_configure(config: pytest.Config) -> None:
    shared = getattr(config, "workerinput", {}).get("first_start")
    config.stash[_FIRST_START] = FirstStart(Path(shared or tempfile.mkdtemp(prefix="dspark-first-start-")))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["first_start"] = str(node.config.stash[_FIRST_START].folder)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    used = any("first_start" in getattr(item, "fixturenames", ()) for item in session.items)
    if used and not session.config.option.collectonly:
        session.config.stash[_FIRST_START].begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    begun = config.stash.get(_FIRST_START, None)
    if begun is not None and not hasattr(config, "workerinput"):  # others may still use it
        begun.end()


@pytest.fixture(scope="session", name="first_start")
def _first_start(pytestconfig: pytest.Config) -> FirstStart:
    """``--once`` with an empty cache, or that of an earlier run; it began with the first test of the session."""
    return pytestconfig.stash[_FIRST_START]


@pytest.fixture(scope="session")
def golden_artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifact directory of each tiny target of tests/golden, with the taps of its drafter."""
    root = tmp_path_factory.mktemp("golden")
    return {
        name: artifacts.export(
            artifacts.GOLDEN / name / "target", root / name, target_layer_ids=artifacts.golden_taps(name)
        )
        for name in artifacts.GOLDEN_NAMES
    }


@pytest.fixture(scope="session")
def text_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a byte-level tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("text")
    return artifacts.export(write_text_model(root / "checkpoint"), root / "artifact")


@pytest.fixture(scope="session")
def smollm2_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32. Slow the first time."""
    return artifacts.exported("smollm2-135m", tmp_path_factory.mktemp("smollm2") / "artifact")


@pytest.fixture(scope="session")
def served_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct in int8 and the shipped drafter, as the quickstart serves them. Slow the first time."""
    return artifacts.served_pair(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def smollm2_int8(served_pair: tuple[Path, Path]) -> Path:
    return served_pair[0]
