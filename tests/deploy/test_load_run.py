"""The whole load test on a tiny model: perf_analyzer fetched, server started, a run cut short and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import CHECKOUT, cache_folder, silent
from random_drafter import write_random_drafter

from dspark_export.drafter import DrafterExport, export_drafter

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

LOAD = CHECKOUT / "deploy" / "load"
TOKENS = 8
BLOCK = 3


@pytest.fixture(scope="module")
def pair(text_artifact, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("load")
    checkpoint = write_random_drafter(text_artifact, root / "checkpoint", block=BLOCK)
    export_drafter(DrafterExport(checkpoint, text_artifact, root / "drafter"), silent)
    return text_artifact, root / "drafter"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dspark_load", "--cache", str(cache_folder()), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=os.environ | {"PYTHONPATH": str(LOAD)},
    )


def test_a_run_is_measured_and_reported(pair, tmp_path):
    verifier, drafter = pair
    common = ["--verifier", verifier, "--drafter", drafter, "--out", tmp_path, "--tokens", TOKENS, "--parts", 1]
    common += ["--policies", "off", f"fixed:{BLOCK}", "causal", "--streams", 2, "--rates", 20, "--threads", 1]
    common += ["--open-seconds", 0.5, "--profile-seconds", 2]
    done = call(*common)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["cell"]["load"]["mode"], row["cell"]["policy"]): row for row in results["rows"]}
    assert set(rows) == {
        (mode, policy) for mode in ("closed", "open") for policy in ("off", f"fixed:{BLOCK}", "causal")
    }
    assert rows["closed", "off"]["budget"]["value"] == 1.0, "no draft is verified"
    assert rows["closed", f"fixed:{BLOCK}"]["budget"]["value"] > 2.0, "the policy is that of the request"
    assert all(row["aggregate"]["value"] > 0 and row["ttft_ms"]["value"] > 0 for row in rows.values())
    assert [one["policy"] for one in results["against_best"]] == ["causal"]
    segments = [json.loads(line) for line in (tmp_path / "segments.jsonl").read_text().splitlines()[1:]]
    assert len(segments) == 6
    for segment in segments:
        assert {answer["tokens"] for answer in segment["answers"]} == {4, 6, 8, 10, 12}, "0.5 to 1.5 times TOKENS"
        assert {answer["domain"] for answer in segment["answers"]} == {"chat", "code", "math"}
    page = (tmp_path / "results.md").read_text()
    assert page == done.stdout
    assert str(tmp_path) not in page and "perf_analyzer 2.48.0" in page
    for name in ("pareto.png", "budget.png"):
        assert (tmp_path / name).stat().st_size > 5000

    again = call(*common)  # everything is in the journal: no server is started
    assert again.returncode == 0
    assert again.stdout == page
    assert "starting the server" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --url HOST:PORT, or --verifier DIR and --drafter DIR"),
        (("--url", "localhost:1", "--verifier", "."), "got both"),
        (("--url", "localhost:1", "--tokens", "1"), "--tokens of at least 2"),
        (("--url", "localhost:1", "--streams", "0"), "numbers above 0"),
        (("--verifier", "nowhere", "--drafter", "nowhere", "--out", "OUT"), "expected a folder with stage.json"),
        (("--url", "localhost:1", "--out", "OUT", "--prompts", "OUT"), "expected *.jsonl files"),
        (("--url", "localhost:1", "--out", "OUT", "--timeout", "20"), "failed to get model metadata"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, tmp_path):
    done = call(*(str(tmp_path) if argument == "OUT" else argument for argument in arguments))
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
