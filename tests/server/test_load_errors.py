"""A server that cannot load says why in one clear message and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from server_state import regions_in_use, stubs

from dspark_backend.serving import orphans
from dspark_backend.serving.options import Ports

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]

WAIT_SECS = 60.0


@dataclass(frozen=True)
class Attempt:
    """A ``dspark-serve`` that was expected to fail."""

    code: int
    output: str
    """What the command printed."""
    log: str
    """What Triton and the models wrote."""


@pytest.fixture
def attempt(tmp_path: Path):
    """Runs ``dspark-serve`` on a repository until it ends by itself; fails if something stays behind."""

    def run(repository: Path, *arguments: str) -> Attempt:
        ports, log = Ports.free(), tmp_path / "triton.log"
        command = [sys.executable, "-m", "dspark_backend.serving.cli", "--model-repository", str(repository)]
        command += ["--host", "127.0.0.1", "--log-file", str(log), "--model", "dspark", *arguments]
        for name, port in ports.named():
            command += [f"--{name}-port", str(port)]
        before = {process.pid for process in psutil.process_iter()}
        regions = regions_in_use()
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_SECS, check=False
        )
        new = [stub for stub in stubs() if stub.pid not in before]
        assert not [stub for stub in new if stub.ppid() == 1 or str(repository) in " ".join(stub.cmdline())]
        assert not [name for name in orphans.orphan_stubs() if name not in before]
        left = {path.name for path in orphans.SHM_FOLDER.glob(f"{orphans.REGION_PREFIX}*")}
        assert left - regions - regions_in_use() == set()
        ports.check_free("127.0.0.1")
        return Attempt(process.returncode, process.stderr + process.stdout, log.read_text())

    return run


def check(attempt: Attempt, *wanted: str) -> None:
    """The start failed in an orderly way, and both the log and the command's output say why."""
    assert attempt.code == 1, attempt.output
    for text in wanted:
        assert text in attempt.log
        assert text in attempt.output
    for crash in ("Signal (", "Segmentation", "Traceback (most recent call last)"):
        assert crash not in attempt.log


def replace(path: Path, data: bytes) -> None:
    """New content for a file that may be a hard link to one of a cache."""
    path.unlink()
    path.write_bytes(data)


def test_truncated_weights(attempt, make_repository):
    repository = make_repository("tiny")
    weights = repository / "verifier" / "1" / "model.onnx.data"
    data = weights.read_bytes()
    replace(weights, data[: len(data) // 2])
    check(
        attempt(repository),
        f"{weights.resolve()}: expected {len(data)} bytes as stage.json says, found {len(data) // 2}",
        "export the model again: dspark-export verifier --model MODEL --out",
    )


def test_a_graph_of_garbage_with_the_right_size(attempt, make_repository):
    repository = make_repository("tiny")
    graph = repository / "verifier" / "1" / "model.onnx"
    replace(graph, b"\xa5" * graph.stat().st_size)
    check(attempt(repository), f"{graph.resolve()}: ONNX Runtime cannot load the graph")


def test_no_artifact(attempt, make_repository):
    repository = make_repository("tiny")
    folder = repository / "verifier" / "1"
    (folder / "stage.json").unlink()
    check(attempt(repository), f"{folder.resolve()}: expected an exported verifier (stage.json), found none")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "stage.json: expected JSON, got"),
        ("[]", "stage.json: expected the kind 'verifier', got 'list'"),
        ('{"kind": "verifier", "format_version": 99}', "got 99"),
    ],
)
def test_a_damaged_description(attempt, make_repository, text, wanted):
    repository = make_repository("tiny")
    replace(repository / "verifier" / "1" / "stage.json", text.encode())
    check(attempt(repository), wanted)


def test_a_missing_tokenizer(attempt, make_repository):
    repository = make_repository("tiny")
    description = repository / "verifier" / "1" / "stage.json"
    stage = json.loads(description.read_text())
    stage["files"]["tokenizer.json"] = 1000
    replace(description, json.dumps(stage).encode())
    check(attempt(repository), "stage.json names tokenizer.json, which is missing")


def test_a_corrupt_tokenizer(attempt, make_repository):
    repository = make_repository("tiny")
    folder = repository / "verifier" / "1"
    stage = json.loads((folder / "stage.json").read_text())
    (folder / "tokenizer.json").write_bytes(b"{}" + b" " * 998)
    stage["files"]["tokenizer.json"] = 1000
    replace(folder / "stage.json", json.dumps(stage).encode())
    check(attempt(repository), "tokenizer.json")


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"max_slot": "4"}, "max_slot: unknown parameter; expected one of"),
        ({"max_slots": "many"}, "max_slots: expected an integer, got 'many'"),
        ({"max_slots": "0"}, "max_slots: expected 1 to 1024, got 0"),
        ({"policy": "clever"}, "policy: expected one of"),
        ({"prefix_reuse": "perhaps"}, "prefix_reuse: expected true or false, got 'perhaps'"),
        ({"verifier": None}, "verifier: expected the artifact directory of the verifier, got nothing"),
        ({"verifier": "../../nowhere/1"}, "nowhere/1: expected an exported verifier (stage.json), found none"),
    ],
)
def test_parameters(attempt, make_repository, parameters, wanted):
    check(attempt(make_repository("tiny", parameters)), wanted)


def test_a_cache_budget_below_one_sequence(attempt, make_repository):
    repository = make_repository("tiny")
    description = repository / "verifier" / "1" / "stage.json"
    stage = json.loads(description.read_text())
    # 1 MiB, the least the setting takes, holds sequences of every model small enough for a test: make this one large.
    stage["num_layers"] *= 100_000
    replace(description, json.dumps(stage).encode())
    set_budget = {"kv_budget_mib": "1"}
    check(attempt(make_repository(description.parent, set_budget)), "kv_budget_mib: expected room for at least one")
