"""A server that cannot load says why in one clear message and leaves nothing behind.

Where many faults are tried, one start loads a broken model for each of them, to save time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
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

    def run(repository: Path, models: Sequence[str] = ("dspark",)) -> Attempt:
        ports, log = Ports.free(), tmp_path / "triton.log"
        command = [sys.executable, "-m", "dspark_backend.serving.cli", "--model-repository", str(repository)]
        command += ["--host", "127.0.0.1", "--log-file", str(log), *(f"--model={name}" for name in models)]
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
    check_log(attempt, *wanted)
    for text in wanted:
        assert text in attempt.output


def check_log(attempt: Attempt, *wanted: str) -> None:
    assert attempt.code == 1, attempt.output
    for text in wanted:
        assert text in attempt.log
    for crash in ("Signal (", "Segmentation", "Traceback (most recent call last)"):
        assert crash not in attempt.log


def replace(path: Path, data: bytes) -> None:
    """New content for a file that may be a hard link to one of a cache."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def variant(repository: Path, name: str, set_parameters, parameters: Mapping[str, str | None]) -> str:
    """A further model like ``dspark`` with other parameters. Returns its name."""
    shutil.copytree(repository / "dspark", repository / name)
    config = repository / name / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "dspark"', f'name: "{name}"', 1))
    set_parameters(config, parameters)
    return name


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
    check(attempt(repository), f"{graph.resolve()}: expected the contents that stage.json names by their SHA-256")


def test_damaged_artifacts(attempt, make_repository, set_parameters):
    repository = make_repository("tiny")
    stage = json.loads((repository / "verifier" / "1" / "stage.json").read_text())
    with_tokenizer = stage | {"files": stage["files"] | {"tokenizer.json": 1000}}
    # A budget of 1 MiB, the least that can be set, holds any model small enough for a test: this one claims more.
    large = stage | {"layer_caches": [[heads, 100_000 * dim] for heads, dim in stage["layer_caches"]]}
    # Name of the case: description, file that is added, what the log must say.
    cases: dict[str, tuple[str | None, Mapping[str, bytes], str]] = {
        "undescribed": (None, {}, "expected an exported verifier (stage.json), found none"),
        "cut": ("{", {}, "stage.json: expected JSON, got"),
        "listed": ("[]", {}, "stage.json: expected the kind 'verifier', got 'list'"),
        "future": (json.dumps(stage | {"format_version": 99}), {}, "got 99"),
        "incomplete": (
            json.dumps({k: v for k, v in stage.items() if k != "head_dim"}),
            {},
            "expected the keys head_dim",
        ),
        "mute": (json.dumps(with_tokenizer), {}, "stage.json names tokenizer.json, which is missing"),
        "babbling": (json.dumps(with_tokenizer), {"tokenizer.json": b"{}" + b" " * 998}, "babbling/tokenizer.json: "),
        "large": (json.dumps(large), {}, "kv_budget_mib: expected room for at least one sequence"),
    }
    for name, (description, files, _) in cases.items():
        folder = repository / "artifacts" / name
        shutil.copytree(repository / "verifier" / "1", folder)
        (folder / "stage.json").unlink()
        if description is not None:
            (folder / "stage.json").write_text(description)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        variant(repository, f"{name}_1", set_parameters, {"verifier": f"../../artifacts/{name}", "kv_budget_mib": "1"})
    check_log(attempt(repository, [f"{name}_1" for name in cases]), *(wanted for _, _, wanted in cases.values()))


def test_wrong_parameters(attempt, make_repository, set_parameters):
    repository = make_repository("tiny")
    cases: dict[str, tuple[Mapping[str, str | None], str]] = {
        "unknown": ({"max_slot": "4"}, "max_slot: unknown parameter; expected one of"),
        "word": ({"max_slots": "many"}, "max_slots: expected an integer, got 'many'"),
        "zero": ({"max_slots": "0"}, "max_slots: expected 1 to 1024, got 0"),
        "policy": ({"policy": "clever"}, "TritonModelException: policy: expected off"),
        "undrafted": ({"policy": "causal"}, "policy: expected off without a drafter, got 'causal'"),
        "flag": ({"prefix_reuse": "perhaps"}, "prefix_reuse: expected true or false, got 'perhaps'"),
        "empty": ({"verifier": ""}, "verifier: expected a path, got an empty string"),
        "nowhere": (
            {"verifier": "../../nowhere/1"},
            "nowhere/1: expected an exported verifier (stage.json), found none",
        ),
    }
    models = [variant(repository, name, set_parameters, parameters) for name, (parameters, _) in cases.items()]
    check_log(attempt(repository, models), *(wanted for _, wanted in cases.values()))


def test_no_verifier(attempt, make_repository):
    message = "verifier: expected the artifact directory of the verifier, got nothing"
    check(attempt(make_repository("tiny", {"verifier": None})), message)
