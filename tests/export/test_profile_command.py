"""``dspark-export profile`` on a golden model: table, cache entry, plot."""

from __future__ import annotations

import sys
from pathlib import Path

import artifacts
import pytest
from typer.testing import CliRunner

from dspark_backend.cost import CostModel, StepCurve
from dspark_backend.cost_cache import CostCache, fingerprint
from dspark_backend.errors import ConfigError
from dspark_backend.profile_grid import ProfilePlan
from dspark_backend.stages.artifact import load_drafter_artifact, load_verifier_artifact
from dspark_export.cli import app
from dspark_export.commands.profile import cost_table
from dspark_export.cost_plot import draw_cost
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.errors import ExportError

NAME = "qwen3_rnn"
PNG = b"\x89PNG\r\n\x1a\n"

MODEL = CostModel(
    (
        StepCurve(1, 128, (1, 3), (0.010, 0.012)),
        StepCurve(4, 128, (1, 3), (0.020, 0.030)),
        StepCurve(1, 512, (1, 3), (0.011, 0.013)),
    ),
    (StepCurve(1, 128, (1, 3), (0.001, 0.005)), StepCurve(4, 128, (1, 3), (0.004, 0.016))),
)


def test_the_server_finds_what_profile_measured(golden_artifacts: dict[str, Path], tmp_path: Path) -> None:
    verifier, drafter = golden_artifacts[NAME], tmp_path / "drafter"
    export_drafter(DrafterExport(artifacts.GOLDEN / NAME / "drafter", verifier, drafter), artifacts.silent)
    arguments = [
        "profile",
        "--verifier",
        str(verifier),
        "--drafter",
        str(drafter),
        "--max-slots",
        "2",
        "--threads",
        "1",
    ]
    arguments += ["--max-seconds", "2", "--out", str(tmp_path / "cost"), "--plot", str(tmp_path / "plots" / "cost.png")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "capacity 128" in result.output
    assert (tmp_path / "plots" / "cost.png").read_bytes().startswith(PNG)
    identity = fingerprint(
        load_verifier_artifact(verifier), load_drafter_artifact(drafter), 1, ProfilePlan(max_slots=2)
    )
    model = CostCache(tmp_path / "cost", identity).load()
    assert model is not None
    assert {curve.num_requests for curve in model.verify} == {1, 2}
    assert model.draft


def test_the_table_shows_times_and_the_most_tokens_a_second() -> None:
    table = cost_table(MODEL, 128)
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == ["requests", "draft of 1 .. all", "0 drafts", "2 drafts"]
    assert cells[0] == ["1", "4"]
    assert cells[1] == ["1.00 .. 5.00 ms", "4.00 .. 16.00 ms"]
    assert cells[2] == ["1: 10.00 ms\n100/s", "4: 20.00 ms\n200/s"]
    assert cells[3] == ["3: 12.00 ms\n200/s", "12: 30.00 ms\n300/s"], "two drafts: 3 / (3 + 12 ms), 12 / (10 + 30 ms)"


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExportError, match=r"dspark-triton\[plot\]"):
        draw_cost(MODEL, tmp_path / "cost.png")


def test_a_senseless_option_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_slots: expected at least 1, got 0"):
        CliRunner().invoke(
            app, ["profile", "--verifier", str(tmp_path), "--max-slots", "0"], catch_exceptions=False
        )  # fmt: skip
