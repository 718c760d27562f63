"""Drafters that do not fit, and settings without one: the server does not start, and says why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import GOLDEN, export, golden_taps, variant
from drafters import export_golden_drafter

from dspark_backend.serving.options import Ports

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

NAME = "qwen3_vanilla"


@pytest.fixture(scope="module")
def drafters(golden_artifacts, tmp_path_factory) -> dict[str, Path]:
    """Artifacts that all differ from the drafter made for the golden target."""
    root = tmp_path_factory.mktemp("drafters")
    fitting = root / "fitting"
    export_golden_drafter(NAME, golden_artifacts[NAME], fitting)
    export_golden_drafter("qwen3_gated", golden_artifacts["qwen3_gated"], root / "stranger")
    variant(fitting, root / "stale", verifier_hash="0" * 64)
    variant(fitting, root / "cut")
    graph = root / "cut" / "draft.onnx.data"
    graph.write_bytes(graph.read_bytes()[:1000])
    (root / "calibrated").mkdir()
    shutil.copytree(fitting, root / "calibrated", dirs_exist_ok=True)
    (root / "calibrated" / "calibration.json").write_text(json.dumps({"format_version": 2}))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def start(tmp_path, make_repository, set_parameters):
    """Runs dspark-serve on variants of ``dspark`` (name -> parameters) until it ends; returns its code and the log."""

    def run(artifact: Path, models: dict[str, dict[str, str | None]]) -> tuple[int, str]:
        repository, log, ports = make_repository(artifact), tmp_path / "triton.log", Ports.free()
        command = [sys.executable, "-m", "dspark_backend.serving.cli", "--model-repository", str(repository)]
        command += ["--host", "127.0.0.1", "--log-file", str(log)]
        for name, port in ports.named():
            command += [f"--{name}-port", str(port)]
        for name, parameters in models.items():
            shutil.copytree(repository / "dspark", repository / name)
            config = repository / name / "config.pbtxt"
            config.write_text(config.read_text().replace('name: "dspark"', f'name: "{name}"', 1))
            set_parameters(config, {"policy": None, "cost_cache": str(tmp_path / "cost")} | parameters)
            command.append(f"--model={name}")
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=90, check=False)
        ports.check_free("127.0.0.1")
        assert not list(tmp_path.glob("cost/*")), "nothing is measured for a model that cannot be served"
        return ended.returncode, log.read_text()

    return run


def test_drafters_that_do_not_fit(start, golden_artifacts, drafters, tmp_path):
    code, log = start(
        golden_artifacts[NAME],
        {
            "m_stranger": {"drafter": str(drafters["stranger"])},
            "m_stale": {"drafter": str(drafters["stale"])},
            "m_cut": {"drafter": str(drafters["cut"])},
            "m_calibrated": {"drafter": str(drafters["calibrated"])},
            "m_nowhere": {"drafter": str(tmp_path / "nowhere")},
            "m_swapped": {"drafter": "../../verifier/1"},
            "m_undrafted": {"policy": "lagged"},
            "m_clever": {"drafter": str(drafters["fitting"]), "policy": "clever"},
        },
    )
    assert code == 1
    for wanted in (
        "drafter drafter does not fit verifier target: the drafter has vocab_size 320, the verifier 384; use the "
        "drafter made for this model",
        f"drafter drafter was exported against a verifier with source hash {'0' * 12}, this one (target) has ",
        "draft.onnx.data: expected ",
        "calibration.json: expected the key ",
        "nowhere: expected an exported drafter (stage.json), found none; export it again: dspark-export drafter",
        "stage.json: expected the kind 'drafter', got 'verifier'",
        "policy: expected off without a drafter, got 'lagged'; set the key drafter, too",
        "policy: expected off",
    ):
        assert wanted in log, wanted
    assert "Traceback" not in log


def test_a_target_with_other_taps(start, drafters, tmp_path):
    taps = golden_taps(NAME)
    other = export(GOLDEN / NAME / "target", tmp_path / "other", target_layer_ids=(0, 1, 2))
    code, log = start(other, {"m_taps": {"drafter": str(drafters["fitting"])}})
    assert code == 1
    assert (
        f"the drafter has target_layer_ids {list(taps)}, the verifier [0, 1, 2]; export the verifier with "
        f"--target-layer-ids {','.join(map(str, taps))}"
    ) in log
    assert "Traceback" not in log
