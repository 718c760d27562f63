"""Keeping the cost model on disk: what counts as the same machine and models, and files that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import artifacts
import pytest
from stage_doubles import WrappedStage

from dspark_backend.cost import CostModel
from dspark_backend.cost_cache import (
    CostCache,
    default_cache_directory,
    device_description,
    fingerprint,
    load_or_measure,
)
from dspark_backend.profile_grid import ProfilePlan
from dspark_backend.stages.artifact import load_drafter_artifact
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.drafter import DrafterExport, export_drafter

NAME = "qwen3_vanilla"
PLAN = ProfilePlan(max_slots=3, repetitions=2)
SMALL = ProfilePlan(max_slots=1, repetitions=1, capacities=(128,))


@pytest.fixture
def verifier(golden_artifacts: dict[str, Path]) -> Iterator[WrappedStage]:
    stage = WrappedStage(OnnxRuntimeVerifier(golden_artifacts[NAME], threads=1))
    yield stage
    stage.close()


def cache_for(directory: Path | None, stage: WrappedStage, threads: int = 1) -> CostCache:
    return CostCache(directory, fingerprint(stage.artifact, None, threads, SMALL))


def test_the_second_load_measures_nothing(verifier: WrappedStage, tmp_path: Path) -> None:
    cache = cache_for(tmp_path / "new" / "folder", verifier)
    model = load_or_measure(cache, verifier, None, SMALL, artifacts.silent)
    steps = len(verifier.batches)
    assert steps > 0
    assert load_or_measure(cache, verifier, None, SMALL, artifacts.silent) == model
    assert len(verifier.batches) == steps
    assert cache.path is not None
    assert [file.name for file in cache.path.parent.iterdir()] == [f"cost-{cache.fingerprint[:16]}.json"]
    cache.invalidate()
    cache.invalidate()
    assert cache.load() is None
    load_or_measure(cache, verifier, None, SMALL, artifacts.silent)
    assert len(verifier.batches) == 2 * steps


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"fingerprint": "x"}',
        b'{"fingerprint": "x", "model": {}}',
        b'{"fingerprint": "FINGERPRINT", "model": {}}',
        b'{"fingerprint": "FINGERPRINT", "model": {"format_version": 3, "verify": [], "draft": [], "uneven": []}}',
    ],
)
def test_a_corrupt_or_foreign_file_is_measured_anew_with_a_warning(
    content: bytes, verifier: WrappedStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_for(tmp_path, verifier)
    assert cache.path is not None
    cache.path.write_bytes(content.replace(b"FINGERPRINT", cache.fingerprint.encode()))
    model = load_or_measure(cache, verifier, None, SMALL, artifacts.silent)
    assert verifier.batches
    assert "measuring again" in caplog.text
    assert cache.load() == model


def test_a_cache_that_cannot_be_written_costs_a_warning(
    verifier: WrappedStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = cache_for(blocked / "cost", verifier)
    assert isinstance(load_or_measure(cache, verifier, None, SMALL, artifacts.silent), CostModel)
    assert "cannot be kept" in caplog.text
    cache.invalidate()


def test_without_a_directory_nothing_is_kept(verifier: WrappedStage) -> None:
    cache = cache_for(None, verifier)
    assert isinstance(load_or_measure(cache, verifier, None, SMALL, artifacts.silent), CostModel)
    assert cache.load() is None
    cache.invalidate()


def test_the_fingerprint_names_everything_that_bears_on_times(
    verifier: WrappedStage, golden_artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = artifacts.GOLDEN / NAME / "drafter"
    export_drafter(DrafterExport(checkpoint, golden_artifacts[NAME], tmp_path), artifacts.silent)
    target, draft = verifier.artifact, load_drafter_artifact(tmp_path)
    same = fingerprint(target, draft, 2, PLAN)
    assert fingerprint(target, draft, 2, PLAN) == same
    assert fingerprint(target, draft, 2, replace(PLAN, max_seconds=60.0, repetitions=3)) == same
    others = [
        fingerprint(target, None, 2, PLAN),
        fingerprint(target, draft, 1, PLAN),
        fingerprint(target, draft, 2, replace(PLAN, max_slots=4)),
        fingerprint(target, draft, 2, replace(PLAN, capacities=(128,))),
        fingerprint(replace(target, source_hash="0"), draft, 2, PLAN),
        fingerprint(replace(target, dtype="float16"), draft, 2, PLAN),
        fingerprint(replace(target, files=target.files | {"model.onnx": 1}), draft, 2, PLAN),
        fingerprint(target, replace(draft, source_hash="0"), 2, PLAN),
    ]
    monkeypatch.setattr("dspark_backend.cost_cache.device_description", lambda: {"processor": "another"})
    others.append(fingerprint(target, draft, 2, PLAN))
    assert len({same, *others}) == len(others) + 1


def test_the_device_is_described() -> None:
    device = device_description()
    assert device["processor"]
    assert int(device["cores"]) >= 1


def test_the_default_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_directory() == tmp_path / "xdg" / "dspark" / "cost"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_directory() == tmp_path / ".cache" / "dspark" / "cost"
