"""Order of the whole suite (fast tests first, then slow ones, then those with a server), and exported models."""

from __future__ import annotations

from pathlib import Path

import artifacts
import pytest
from tiny_text_model import write_text_model


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def cost(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("server") else 1 if item.get_closest_marker("slow") else 0

    items.sort(key=cost)  # stable: what shares a fixture stays together


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
