"""The programs that the chart carries: they run here as they run in a pod."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from artifacts import CHECKOUT
from google.protobuf import text_format
from helm_tools import CHART, named, render
from helm_values import CPU
from tritonclient.grpc import model_config_pb2

from dspark_backend.config import EngineConfig
from dspark_backend.serving.health import Health
from dspark_backend.serving.options import Ports


def program(name: str) -> ModuleType:
    spec = spec_from_file_location(name, CHART / "files" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def artifacts_folder(tmp_path: Path) -> Path:
    for name in ("verifier", "drafter"):
        (tmp_path / "artifacts" / name / "1").mkdir(parents=True)
        (tmp_path / "artifacts" / name / "1" / "stage.json").touch()
    return tmp_path / "artifacts"


def lay(tmp_path: Path, artifacts: Path, parameters: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "parameters.json"
    file.write_text(json.dumps(parameters))
    script = CHART / "files" / "lay_repository.py"
    arguments = [f"--template={CHECKOUT / 'model_repository'}", f"--out={tmp_path / 'models'}"]
    arguments += [f"--artifacts={artifacts}", f"--parameters={file}", *more]
    return subprocess.run([sys.executable, "-I", script, *arguments], capture_output=True, text=True, check=False)


def laid_config(tmp_path: Path) -> EngineConfig:
    """What Triton's parser and then the engine make of the laid config.pbtxt."""
    text = (tmp_path / "models" / "dspark" / "config.pbtxt").read_text()
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert text.count('key: "max_slots"') == 1
    return EngineConfig.from_parameters({k: v.string_value for k, v in parsed.parameters.items()}, tmp_path)


def test_the_laid_model_has_the_charts_parameters(tmp_path: Path, artifacts_folder: Path) -> None:
    data = render(CPU).find("ConfigMap", "-files")["data"]
    result = lay(tmp_path, artifacts_folder, json.loads(data["parameters.json"]), "--drafter")
    assert result.returncode == 0, result.stderr
    config = laid_config(tmp_path)
    assert (config.max_slots, config.kv_budget_mib, config.threads) == (16, 1024, 2)
    assert config.verifier == artifacts_folder / "verifier" / "1"
    assert config.drafter == artifacts_folder / "drafter" / "1"
    assert config.depth_policy.drafts
    assert (tmp_path / "models" / "dspark" / "1" / "model.py").is_file()
    # A second start of the container finds what the first left.
    assert lay(tmp_path, artifacts_folder, {"max_slots": "8"}).returncode == 0
    config = laid_config(tmp_path)
    assert (config.max_slots, config.drafter) == (8, None)


def test_a_missing_artifact_is_named(tmp_path: Path, artifacts_folder: Path) -> None:
    (artifacts_folder / "drafter" / "1" / "stage.json").unlink()
    result = lay(tmp_path, artifacts_folder, {}, "--drafter")
    assert result.returncode == 1
    assert "drafter/1: expected an artifact with stage.json, found none" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_export_container_runs_once(tmp_path: Path) -> None:
    container = render('modelRepository={"source":"export","export":{"verifierModel":"m"}}').find("Deployment")
    container = named(container["spec"]["template"]["spec"]["initContainers"], "export-verifier")
    out = tmp_path / "verifier" / "1"
    command = [*container["command"], str(out), "echo", *container["args"][2:]]
    ran = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ran == f"verifier --model m --out {out}\n"
    out.mkdir(parents=True)
    (out / "stage.json").touch()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    failing = [*container["command"], str(tmp_path / "other"), "false"]
    assert subprocess.run(failing, check=False).returncode != 0


SILENT = Health(False, False, "model dspark gave no answer within 8.0 s", 8.0)
DEAD = Health(False, False, "model dspark failed: Stub process 'dspark_0_0' is not healthy.", 0.1)
FULL = Health(False, True, "model dspark failed: [UNAVAILABLE] the queue is full", 0.1)


@pytest.mark.parametrize(
    ("state", "before", "after", "well"),
    [
        (Health(True, True, "dspark answered", 0.1), None, None, True),
        (FULL, None, None, True),
        (SILENT, 100.0, 140.0, True),
        (SILENT, 100.0, 100.0, False),
        (SILENT, None, None, False),
        (DEAD, 100.0, 140.0, False),
    ],
)
def test_probe_verdict(state: Health, before: float | None, after: float | None, well: bool) -> None:
    good, reason = program("probe").verdict(state, before, after)
    assert good is well
    assert reason


class _Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        label = '{model="dspark",version="1"}'
        lines = (f"dspark_steps_total{label} 7", f"dspark_generation_tokens_total{label} 1.5e+01")
        self.wfile.write("\n".join(["# HELP x", *lines, f"dspark_num_requests_running{label} 3", ""]).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metrics_url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        server.shutdown()


def test_probe_counts_work(metrics_url: str) -> None:
    probe = program("probe")
    assert probe.work_done(metrics_url) == 22.0
    assert probe.work_done(f"http://127.0.0.1:{Ports.free().http}/metrics") is None


def test_probe_of_a_server_that_is_gone(metrics_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"127.0.0.1:{Ports.free().grpc}"
    assert program("probe").main([f"--url={url}", f"--metrics-url={metrics_url}", "--timeout=2"]) == 1
    assert capsys.readouterr().out == f"unwell: nothing answers at {url}\n"


def test_load_summary() -> None:
    second = 1_000_000_000
    requests = [
        {"timestamp": start * second, "response_timestamps": [(start + 1) * second, (start + 10) * second]}
        for start in (0, 10)
    ]
    numbers = program("load").summary({"experiments": [{"requests": requests}]}, max_tokens=10)
    assert numbers == {
        "requests": 2,
        "ttft_p50": 1.0,
        "ttft_p95": 1.0,
        "itl_mean": 1.0,
        "tokens_per_second_per_user": 1.0,
        "tokens_per_second": 1.0,
    }
    with pytest.raises(ValueError, match="expected answered requests"):
        program("load").summary({"experiments": [{"requests": []}]}, 10)


def test_load_job_runs_every_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = render(CPU, 'load={"enabled":true}').find("Job", "-load-1")
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    arguments = [f"--prompts={CHART / 'files' / 'prompts.json'}" if "--prompts" in a else a for a in arguments]
    monkeypatch.chdir(tmp_path)
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        calls.append(command)
        export = Path(command[command.index("--profile-export-file") + 1])
        request = {"timestamp": 0, "response_timestamps": [10**8, 10**9]}
        # As perf_analyzer writes: the responses' tensors are not always text.
        written = json.dumps({"experiments": [{"requests": [request]}], "tensor": "?"}).encode()
        export.write_bytes(written.replace(b"?", b"\xc6\x01"))

    load = program("load")
    monkeypatch.setattr(load.subprocess, "run", run)
    assert load.main(arguments) == 0
    assert len(calls) == 12 and all(call[call.index("-u") + 1] == "try-dspark:8001" for call in calls)
    given = json.loads((tmp_path / "fixed-1-4.input.json").read_text())["data"]
    assert given[0]["draft_policy"] == ["fixed:1"] and given[0]["ignore_eos"] == [True]
