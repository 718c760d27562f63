"""``dspark-export drafter``, ``calibrate`` and ``evaluate`` from end to end, and the prompt files that they read."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from random_drafter import write_random_drafter
from typer.testing import CliRunner, Result

from dspark_backend.calibration import CALIBRATION_FILE, Calibration
from dspark_backend.config import EngineConfig
from dspark_backend.errors import ArtifactError, InvalidRequest
from dspark_backend.runner import load_drafting
from dspark_backend.stages.artifact import load_drafter_artifact
from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export import cli
from dspark_export.errors import ExportError
from dspark_export.prompts import read_prompts

PNG = b"\x89PNG\r\n\x1a\n"
BLOCK = 4


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@dataclass(frozen=True)
class Workshop:
    """Artifacts and prompts to work on."""

    verifier: Path
    drafter: Path
    questions: Path
    """JSON lines."""
    lines: Path
    """Plain text."""

    @property
    def both(self) -> tuple[object, ...]:
        return ("--verifier", self.verifier, "--drafter", self.drafter, "--threads", 1)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Step times that are measured here are not those of the user's server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "160")
        yield


@pytest.fixture(scope="module")
def made(text_artifact, tmp_path_factory) -> Workshop:
    root = tmp_path_factory.mktemp("workshop")
    checkpoint = write_random_drafter(text_artifact, root / "checkpoint", block=BLOCK, head="gated", seed=3)
    drafter = root / "drafter"
    output = succeed("drafter", "--checkpoint", checkpoint, "--verifier", text_artifact, "--out", drafter)
    assert f"gated head, block {BLOCK}, 1 layers, 300 of 300 tokens" in output
    entries = [
        {"prompt": "one"},
        {"text": "two"},
        {"turns": ["three", "and then?"]},
        {"messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "four"}]},
        "five",
    ]
    (root / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (root / "lines.txt").write_text("six\n\nseven\neight\n")
    return Workshop(text_artifact, drafter, root / "questions.jsonl", root / "lines.txt")


@pytest.fixture(scope="module")
def calibrated(made) -> str:
    """What ``calibrate`` printed."""
    return succeed("calibrate", *made.both, "--prompts", made.questions, "--prompts", made.lines, "--max-tokens", 48)


def test_the_exported_drafter_belongs_to_its_verifier(made):
    artifact = load_drafter_artifact(made.drafter)
    assert (artifact.block_size, artifact.markov_head) == (BLOCK, "gated")


def test_calibrate_prints_a_table(calibrated, made):
    assert "ECE before" in calibrated and "AUC" in calibrated
    for regime in ("greedy", "sampled"):
        rows = calibrated[calibrated.index(regime) :].splitlines()[:BLOCK]
        assert [re.findall(r"[\d.]+", row)[0] for row in rows] == [str(place + 1) for place in range(BLOCK)]
        # Two of eight requests judge: every fourth.
        assert int(re.findall(r"[\d.]+", rows[0])[1]) > 20
    assert f"{made.drafter / CALIBRATION_FILE} written" in calibrated
    assert f"drawn in {made.drafter / 'reliability.png'}" in calibrated


def test_calibrate_draws_the_reliability_diagram(calibrated, made):
    assert (made.drafter / "reliability.png").read_bytes().startswith(PNG)


def test_the_engine_takes_the_calibration(calibrated, made):
    artifact = load_drafter_artifact(made.drafter)
    stored = Calibration.load(made.drafter / CALIBRATION_FILE, BLOCK, artifact.source_hash)
    # A random drafter's confidence of about one half is far from what is accepted of it.
    for regime in (stored.greedy, stored.sampled):
        assert (regime.temperatures[0], regime.biases[0]) != (1.0, 0.0)
    config = EngineConfig(verifier=made.verifier, drafter=made.drafter, threads=1, profile_seconds=1.0)
    stage = OnnxRuntimeVerifier(made.verifier, 1)
    drafting = load_drafting(config, stage)
    assert drafting.calibration == stored
    drafting.drafter.close()
    stage.close()


def test_calibrating_again_gives_the_same(calibrated, made, tmp_path):
    before = json.loads((made.drafter / CALIBRATION_FILE).read_text())
    prompts = ("--prompts", made.questions, "--prompts", made.lines)
    succeed("calibrate", *made.both, *prompts, "--max-tokens", 48, "--plot", tmp_path / "own.png")
    assert json.loads((made.drafter / CALIBRATION_FILE).read_text()) == before
    assert (tmp_path / "own.png").read_bytes().startswith(PNG)


def test_a_foreign_calibration_is_refused(made, tmp_path):
    copy = tmp_path / "drafter"
    shutil.copytree(made.drafter, copy)
    Calibration.identity(BLOCK, "ff" * 32).save(copy / CALIBRATION_FILE)
    with pytest.raises(ArtifactError, match=r"calibration\.json: expected a calibration of the drafter with"):
        run("evaluate", "--verifier", made.verifier, "--drafter", copy, "--prompts", made.lines, "--out", tmp_path)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_evaluate_prints_and_draws(made, tmp_path, temperature):
    output = succeed(
        "evaluate", *made.both, "--prompts", made.questions, "--prompts", made.lines, "--max-tokens", 24,
        "--temperature", temperature, "--out", tmp_path / "new" / "folder",
    )  # fmt: skip
    for name in ("conditional_acceptance.png", "threshold_sweep.png"):
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(PNG)
    lengths = output[output.index("Accepted length") : output.index("Conditional acceptance")]
    rows = {row[0]: row[1:] for row in (re.findall(r"[\w.]+", line) for line in lengths.splitlines()) if len(row) == 4}
    assert set(rows) == {"questions", "lines", "mean"}
    assert [rows[name][0] for name in ("questions", "lines", "mean")] == ["5", "3", "8"]
    (_, _, mean) = rows.pop("mean")
    assert float(mean) == pytest.approx(sum(float(row[2]) for row in rows.values()) / 2, abs=0.001)
    for requests, rounds, length in rows.values():
        # An answer has at most 24 tokens, and the first comes from the prompt.
        assert int(requests) <= int(rounds) <= float(length) * int(rounds) <= 23 * int(requests) + 0.1
        assert 1.0 <= float(length) <= 1.0 + BLOCK
    assert "Threshold sweep" in output and "0.95" in output


def test_per_file_limits_the_prompts(made, tmp_path):
    output = succeed(
        "evaluate", *made.both, "--prompts", made.questions, "--per-file", 2, "--max-tokens", 8, "--out", tmp_path
    )  # fmt: skip
    assert re.search(r"questions\W+2\W", output)


def test_nothing_is_written_where_a_prompt_cannot_be_run(made, tmp_path):
    prompts = tmp_path / "long.txt"
    prompts.write_text("x" * 1000 + "\n")
    with pytest.raises(InvalidRequest, match="prompt: expected at most 511 tokens"):
        run("evaluate", *made.both, "--prompts", prompts, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt: there is no such file"),
        ("empty.txt", "\n  \n", "empty.txt: expected at least one prompt, the file is empty"),
        ("broken.jsonl", '"fine"\n{"prompt": \n', "broken.jsonl, line 2: expected JSON, got "),
        ("other.jsonl", '{"question": "why?"}\n', "other.jsonl, line 1: expected a string, or an object with prompt"),
    ],
)
def test_a_bad_prompt_file_is_one_clear_line(monkeypatch, capsys, made, tmp_path, command, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    arguments = [command, *made.both, "--prompts", tmp_path / name]
    monkeypatch.setattr(sys, "argv", ["dspark-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


# read_prompts


def prompts_of(path: Path, text: str, limit: int | None = None) -> list[object]:
    path.write_text(text, encoding="utf-8")
    return [json.loads(prompt) for prompt in read_prompts(path, limit)]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_text_is_a_prompt_a_line(tmp_path):
    text = 'first\n\n   \n{"prompt": "not read as JSON"}\r\nlast without an end'
    assert prompts_of(tmp_path / "p.txt", text) == [
        user("first"),
        user('{"prompt": "not read as JSON"}'),
        user("last without an end"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('"plain"', user("plain")),
        ('{"prompt": "a", "text": "b"}', user("a")),
        ('{"text": "b"}', user("b")),
        ('{"turns": ["c", "d"], "prompt": "a"}', user("c")),
        ('{"turns": [], "prompt": "a"}', user("a")),
        ('{"messages": [{"role": "system", "content": "e"}], "prompt": "a"}', [{"role": "system", "content": "e"}]),
        ('{"prompt": "zwei\\nZeilen \\u00e4"}', user("zwei\nZeilen ä")),
    ],
)
def test_json_lines_in_all_their_forms(tmp_path, line, expected):
    assert prompts_of(tmp_path / "p.jsonl", line + "\n") == [expected]
    assert prompts_of(tmp_path / "p.json", line) == [expected]


@pytest.mark.parametrize("line", ["1", "null", "[]", "{}", '{"prompt": 3}', '{"turns": [1]}', '{"messages": "x"}'])
def test_json_without_a_prompt(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'"good"\n\n{line}\n')
    with pytest.raises(
        ExportError, match=r"p\.jsonl, line 3: expected a string, or an object with prompt, text, turns"
    ):
        read_prompts(tmp_path / "p.jsonl")


def test_the_limit_stops_reading(tmp_path):
    assert prompts_of(tmp_path / "p.jsonl", '"a"\n"b"\nbroken\n', limit=2) == [user("a"), user("b")]


def test_only_line_feeds_end_a_line(tmp_path):
    """JSON writers leave the other line ends of Unicode inside strings."""
    text = "one\u2028two\x85three\x0bfour"
    assert prompts_of(tmp_path / "p.txt", text + "\n") == [user(text)]
    assert prompts_of(tmp_path / "p.jsonl", json.dumps("one\u2028two\x85", ensure_ascii=False)) == [
        user("one\u2028two\x85")
    ]


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ExportError, match=r"p\.txt: expected UTF-8 text"):
        read_prompts(tmp_path / "p.txt")


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf"a"\n')
    assert [json.loads(prompt) for prompt in read_prompts(tmp_path / "p.jsonl")] == [user("a")]
