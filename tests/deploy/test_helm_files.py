"""The programs that the chart carries: they run here as they run in a pod."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from artifacts import CHECKOUT
from google.protobuf import text_format
from helm_tools import CHART, named, render
from helm_values import CPU
from tritonclient.grpc import model_config_pb2

from dspark_backend.config import EngineConfig


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


def exported(folder: Path, name: str, arguments: list[str]) -> bool:
    """Whether a start of the rendered init container makes the artifact anew. The exporter tells its words."""
    export: dict[str, Any] = {"verifierModel": "m", "verifierArguments": arguments, "drafterCheckpoint": "d"}
    values = {"source": "export", "export": export}
    container = render(f"modelRepository={json.dumps(values)}").find("Deployment")["spec"]["template"]["spec"]
    container = named(container["initContainers"], f"export-{name}")
    assert container["command"][:1] == ["/bin/sh"]
    assert {"name": "files", "mountPath": "/etc/dspark", "readOnly": True} in container["volumeMounts"]
    script = CHART / "files" / Path(container["command"][1]).name
    # As laid out in the ConfigMap.
    assert script.read_text() == render().find("ConfigMap", "-files")["data"][script.name]
    out, *words = [word.replace("/artifacts", str(folder)) for word in container["args"]]
    exporter = folder / "dspark-export"
    exporter.write_text(EXPORTER)
    exporter.chmod(0o755)
    assert words[0] == "dspark-export"
    command = ["/bin/sh", script, out, exporter, *words[1:]]
    ran = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ("exported already" in ran) is not ran.startswith("exporting")
    return ran.startswith("exporting")


EXPORTER = """#!/bin/sh
set -e
for word in "$@"; do out="$word"; done
case "$*" in *unknown*) exit 2 ;; esac
echo exporting
mkdir -p "$out"
echo "$@" > "$out/stage.json"
"""


def test_the_export_container_exports_again_for_other_arguments(tmp_path: Path) -> None:
    stage = tmp_path / "verifier" / "1" / "stage.json"
    assert exported(tmp_path, "verifier", ["--dtype", "float16"])
    assert "--dtype float16 --out" in stage.read_text()
    assert not exported(tmp_path, "verifier", ["--dtype", "float16"])
    assert exported(tmp_path, "verifier", ["--dtype", "bfloat16"])
    assert "--dtype bfloat16 --out" in stage.read_text()
    assert not exported(tmp_path, "verifier", ["--dtype", "bfloat16"])
    # One that is not complete, and one that is not ours.
    stage.unlink()
    assert exported(tmp_path, "verifier", ["--dtype", "bfloat16"])
    stage.write_text("laid by hand")
    assert exported(tmp_path, "verifier", ["--dtype", "bfloat16"])


def test_the_export_container_exports_a_drafter_again_for_another_verifier(tmp_path: Path) -> None:
    for arguments in ([], ["--dtype", "bfloat16"]):
        assert exported(tmp_path, "verifier", arguments)
        assert exported(tmp_path, "drafter", arguments)
        assert not exported(tmp_path, "drafter", arguments)


def test_a_failed_export_keeps_the_old_one(tmp_path: Path) -> None:
    assert exported(tmp_path, "verifier", [])
    with pytest.raises(subprocess.CalledProcessError):
        exported(tmp_path, "verifier", ["--unknown"])
    assert not exported(tmp_path, "verifier", [])


def test_replicas_that_start_together_export_once(tmp_path: Path) -> None:
    """The second would remove what the first has begun to serve."""
    exporter = tmp_path / "dspark-export"
    exporter.write_text(EXPORTER.replace("echo exporting", "echo exporting; sleep 0.3"))
    exporter.chmod(0o755)
    command = ["/bin/sh", CHART / "files" / "export_stage.sh", tmp_path / "verifier" / "1", exporter, "verifier"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate(timeout=20)[0].split()[0] for process in started)
    assert [process.returncode for process in started] == [0, 0, 0]
    assert said[-1] == "exporting" and all("verifier/1:" in word for word in said[:2]), said


def test_the_load_job_runs_the_load_tool_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "deploy" / "load"))
    from dspark_load import options, prompts

    job = render(CPU, 'load={"enabled":true,"rates":[0.5],"text":true}').find("Job", "-load-1")
    spec = job["spec"]["template"]["spec"]
    container = spec["containers"][0]
    assert container["command"] == ["python3", "-m", "dspark_load"]
    given = options.parse(container["args"])
    assert given.url == "try-dspark:8001"
    assert options.policies(given, 5) == ["off", "fixed:1", "causal", "lagged"]
    assert [str(load) for load in given.loads] == ["1 streams", "4 streams", "16 streams", "0.5 requests/s"]
    assert (given.tokens, given.parts, given.text) == (128, 2, True)
    assert prompts.read(given.prompts, 0)
    written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert str(given.out.parent) in written and str(given.cache.parent) in written
    # It begins when a replica answers: the Job is made together with them, and its tool gives up at once.
    wait = named(spec["initContainers"], "wait")
    assert wait["command"] == ["dspark-serve", "health"] and f"--url={given.url}" in wait["args"]
    deployment = render(CPU).find("Deployment")["spec"]
    probe = deployment["template"]["spec"]["containers"][0]["startupProbe"]
    (patience,) = [int(word.partition("=")[2]) for word in wait["args"] if word.startswith("--wait=")]
    assert patience > probe["periodSeconds"] * probe["failureThreshold"]
    # What the images hold there is copied to where Python looks.
    copy = named(spec["initContainers"], "load-tool")
    source = copy["command"][-2].removesuffix("/.")
    dockerfile = (CHECKOUT / "deploy" / "docker" / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", dockerfile, flags=re.MULTILINE)
    assert [s for s in stages if "COPY model_repository " in s] == [
        s for s in stages if f"COPY deploy/load {source}\n" in s
    ]
    assert {"name": "PYTHONPATH", "value": copy["command"][-1]} in container["env"]
    kept = render(CPU, 'load={"enabled":true,"resultsClaim":"r"}').find("Job", "-load-1")["spec"]["template"]["spec"]
    (mount,) = [m for m in kept["containers"][0]["volumeMounts"] if m["name"] == "results"]
    assert named(kept["volumes"], "results") == {"name": "results", "persistentVolumeClaim": {"claimName": "r"}}
    assert options.parse(kept["containers"][0]["args"]).out == Path(mount["mountPath"]) / "try-dspark-load-1"
    assert options.parse(render(CPU, LOAD).find("Job", "-load-1")["spec"]["template"]["spec"]["containers"][0]["args"])


LOAD = 'load={"enabled":true}'
