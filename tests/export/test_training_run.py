"""Runs of training on a tiny target: resumed to the last bit, killed, refused, and drafters that are better for it."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from artifacts import GOLDEN
from safetensors.numpy import load_file
from speculation import SpeculatingDriver
from training import differences, learned_differences, state_of, tiny_target, train
from typer.testing import CliRunner

from dspark_backend.request import GenerationRequest
from dspark_export.cli import app
from dspark_export.drafter import DrafterExport, export_drafter
from dspark_export.errors import ExportError
from dspark_export.rounds import RoundTable
from dspark_export.training.checkpoint import CHECKPOINT_FILE, check_identity
from dspark_export.training.curves import (
    HELD_OUT_FILE,
    PICTURE_FILE,
    STEP_COLUMNS,
    STEPS_FILE,
    Curve,
    draw_curves,
    held_out_columns,
    read_rows,
)
from dspark_export.training.generate import Stopped
from dspark_export.training.run import LOCK_FILE, TrainingRun
from dspark_export.training.shard import load_shard

COMMAND = (sys.executable, "-m", "dspark_export.cli")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_target(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def straight(target, tmp_path_factory):
    """A run of six steps in one sitting."""
    out = tmp_path_factory.mktemp("straight")
    train(target.settings(out), steps=6)
    return out


def test_a_resumed_run_is_the_same_to_the_last_bit(target, straight, tmp_path):
    train(target.settings(tmp_path), steps=3)
    half = state_of(tmp_path)
    assert half.position.step == 3 and learned_differences(half, state_of(straight))
    # Whatever else draws meanwhile must not matter.
    torch.randn(5)
    np.random.random(5)
    report = train(target.settings(tmp_path), steps=6, resume=True)
    assert report.position.step == 6 and not report.finished
    assert learned_differences(state_of(tmp_path), state_of(straight)) == []
    assert (tmp_path / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    losses = [[row["loss"] for row in read_rows(out / STEPS_FILE)] for out in (tmp_path, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_other_heads_and_precisions_resume_to_the_last_bit(target, tmp_path, head):
    changes = {"head": head, "precision": "bfloat16", "draft_vocab": None, "layers": 2}
    train(target.settings(tmp_path / "a", **changes), steps=4)
    train(target.settings(tmp_path / "b", **changes), steps=2)
    train(target.settings(tmp_path / "b", **changes), steps=4, resume=True)
    assert learned_differences(state_of(tmp_path / "a"), state_of(tmp_path / "b")) == []


def test_steps_change_the_weights_and_the_average_follows(straight):
    state = state_of(straight)
    assert differences(state.model, state.average)
    assert "d2t" in state.model and torch.equal(state.model["d2t"], state.average["d2t"])
    assert list(state.optimisers) == ["0"]
    moments = [value["exp_avg"].abs().max() for value in state.optimisers["0"]["state"].values()]
    assert all(float(value) > 0 for value in moments), "every parameter has a gradient"


def wait_for_steps(process, out, count, seconds=120.0):
    deadline = time.monotonic() + seconds
    while len(read_rows(out / STEPS_FILE)) < count or not (out / CHECKPOINT_FILE).is_file():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(arguments):
    return subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(target, tmp_path):
    train(target.settings(tmp_path / "straight"), steps=16)
    out = tmp_path / "killed"
    process = start(target.command_line(out, checkpoint_minutes=0.001))
    try:
        wait_for_steps(process, out, 6)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = state_of(out).position.step
    assert 0 < kept < 16, "killed too late: the test says nothing"
    train(target.settings(out), steps=16, resume=True)
    assert learned_differences(state_of(out), state_of(tmp_path / "straight")) == []
    assert [int(row["step"]) for row in read_rows(out / STEPS_FILE)] == list(range(1, 17))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step(target, tmp_path, number):
    process = start(target.command_line(tmp_path, checkpoint_minutes=0.001))
    wait_for_steps(process, tmp_path, 3)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert "go on with --resume" in text and "left" in text
    rows = read_rows(tmp_path / STEPS_FILE)
    assert state_of(tmp_path).position.step == len(rows) == int(rows[-1]["step"])


def test_a_stop_before_the_first_step_keeps_whole_shards(target, tmp_path):
    asked = []

    def stop():
        asked.append(None)
        return (tmp_path / "corpus" / "shard-00000.npz").is_file()

    with pytest.raises(Stopped):
        TrainingRun(target.settings(tmp_path), stop, lambda status: None).run(False)
    assert asked and {path.name for path in tmp_path.iterdir()} == {"corpus", LOCK_FILE}
    train(target.settings(tmp_path), steps=1, resume=True)
    assert state_of(tmp_path).position.step == 1


def test_a_stop_while_text_is_generated_changes_nothing(target, tmp_path):
    """Between two rounds, where a run that writes its own text spends most of its time."""
    changes = {"shard_size": 4, "passes": 1}
    train(target.settings(tmp_path / "straight", **changes), steps=3)
    said = []
    run = TrainingRun(
        target.settings(tmp_path / "stopped", **changes),
        lambda: any(what.startswith("generate shard 2") for what in said),
        lambda status: said.append(status.what),
    )
    assert not run.run(False).finished
    assert state_of(tmp_path / "stopped").position.step == 1
    train(target.settings(tmp_path / "stopped", **changes), steps=3, resume=True)
    assert learned_differences(state_of(tmp_path / "stopped"), state_of(tmp_path / "straight")) == []


def test_one_process_trains_in_a_folder(target, tmp_path):
    settings, refused = target.settings(tmp_path), []

    def watch(status):
        if status.what == "save":
            with pytest.raises(ExportError, match="another process trains in this folder; let it end first"):
                train(settings, steps=2, resume=True)
            refused.append(status.position.step)

    train(settings, steps=1, watch=watch)
    assert refused == [1]
    train(settings, steps=2, resume=True)
    assert [row["step"] for row in read_rows(tmp_path / STEPS_FILE)] == ["1", "2"]


def test_no_text_is_generated_behind_the_end(target, tmp_path):
    assert train(target.settings(tmp_path, shard_size=4, passes=1, tokens=1)).finished
    shards = sorted(path.name for path in (tmp_path / "corpus").glob("*.npz"))
    assert shards == ["shard-00000.npz", "shard-00001.npz"]


def test_runs_that_cannot_go_on_are_refused(target, straight, tmp_path):
    with pytest.raises(ExportError, match="it holds a run; continue it with --resume"):
        train(target.settings(straight), steps=7)
    with pytest.raises(ExportError, match=r"started with --learning-rate 0\.003, now it is 0\.01"):
        train(target.settings(straight, learning_rate=0.01), steps=7, resume=True)
    with pytest.raises(ExportError, match="is trained with --precision float32, now it is bfloat16"):
        train(target.settings(straight, precision="bfloat16"), steps=7, resume=True)
    with pytest.raises(ExportError, match="--verifier"):
        check_identity({"seed": 1, "verifier_hash": "a"}, {"seed": 1}, "b")
    (tmp_path / CHECKPOINT_FILE).write_bytes((straight / CHECKPOINT_FILE).read_bytes()[:1000])
    with pytest.raises(ExportError, match="expected the checkpoint of a training run"):
        train(target.settings(tmp_path), steps=7, resume=True)
    other = tiny_target_with_other_weights(tmp_path)
    with pytest.raises(ExportError, match="expected the checkpoint that the verifier was exported from"):
        train(dataclasses.replace(target.settings(tmp_path / "x"), model=str(other)), steps=1)
    assert not list((tmp_path / "x").rglob("shard-*"))


def tiny_target_with_other_weights(folder):
    import tiny_llama

    tiny_llama.make(folder / "other", vocab_size=98)
    return folder / "other"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hours": 1.0}, "--hours and --tokens"),
        ({"tokens": 0}, "--tokens: expected more than 0, got 0"),
        ({"head": "wide"}, "--head"),
        ({"rank": 1}, "--rank"),
        ({"intermediate_size": 0}, "--intermediate-size: expected at least 1, got 0"),
        ({"muon_iterations": 100}, "--muon-iterations"),
        ({"dtype": "int8"}, "--dtype"),
        ({"anchors": 0}, "--anchors"),
        ({"learning_rate": 2.0}, "--learning-rate"),
    ],
)
def test_options_out_of_range_are_named(target, tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        target.settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_vocab": 98}, "--draft-vocab: expected at most the target's 97"),
        ({"answer_tokens": 300}, "the verifier takes 256"),
        ({"init_layers": "target", "intermediate_size": 32}, "leave --intermediate-size out"),
        ({"init_layers": "target", "layers": 4}, "--layers: expected at most the target's 3"),
    ],
)
def test_options_that_do_not_fit_the_target_are_named(target, tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        train(target.settings(tmp_path, **changes), steps=1)
    assert not list(tmp_path.rglob("shard-*")), "at once, not after the first text"


def test_layers_can_start_as_the_targets_last_ones(target, tmp_path):
    settings = target.settings(tmp_path, init_layers="target", layers=2, learning_rate=1e-8)
    train(settings, steps=1)
    theirs = load_file(target.model / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    for layer, source in ((0, 1), (1, 2)):
        for name in ("self_attn.k_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            np.testing.assert_allclose(
                ours[f"layers.{layer}.{name}"], theirs[f"model.layers.{source}.{name}"], atol=1e-6
            )


def test_a_written_drafter_can_be_trained_further(target, straight, tmp_path):
    settings = target.settings(tmp_path, init_from=straight, seed=5, learning_rate=1e-8)
    train(settings, steps=1)
    before, after = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path))
    assert before.keys() == after.keys()
    for name, weights in before.items():
        np.testing.assert_allclose(after[name], weights, rtol=1e-4, atol=1e-6, err_msg=name)
    # The scale of the features, which the written weights contain, is another on other text.
    scales = [state_of(folder).feature_scale for folder in (straight, tmp_path)]
    assert not torch.equal(*scales)
    with pytest.raises(ExportError, match="expected block_size 3, as the options say, the drafter has 5"):
        train(target.settings(tmp_path / "block", init_from=straight, block_size=3), steps=1)
    with pytest.raises(ExportError, match="expected layers like the target's"):
        train(target.settings(tmp_path / "layers", init_from=straight, layers=2), steps=1)
    # One of a target with another hidden size.
    other = GOLDEN / "qwen3_vanilla" / "drafter"
    with pytest.raises(ExportError, match=f"--init-from {other}: expected"):
        train(target.settings(tmp_path / "other", init_from=other), steps=1)
    assert not list((tmp_path / "other").rglob("shard-*"))


def test_bigrams_are_a_better_start(tmp_path):
    """Before the first step counts: the first row of the curve, and the loss of the first step."""
    target, found = tiny_target(tmp_path / "target", tied=False), {}
    for start_from in ("bigram", "random"):
        out = tmp_path / start_from
        train(target.settings(out, init_markov=start_from, init_layers="random", rank=24, held_out=16), steps=1)
        held_out = float(read_rows(out / HELD_OUT_FILE)[0]["accepted_length"])
        found[start_from] = (held_out, float(read_rows(out / STEPS_FILE)[0]["l1"]))
    assert found["bigram"][0] > found["random"][0] + 0.02
    assert found["bigram"][1] < 0.9 * found["random"][1]


def test_the_written_checkpoint(target, straight):
    config = json.loads((straight / "config.json").read_text())
    assert config["architectures"] == ["LlamaDSparkModel"] and config["draft_vocab_size"] == 64
    assert config["target_layer_ids"] and config["num_hidden_layers"] == 1 and config["block_size"] == 5
    stored = load_file(straight / "model.safetensors")
    assert not any("embed_tokens" in name or "lm_head" in name for name in stored)
    assert stored["d2t"].dtype == np.int64 and (np.diff(stored["d2t"]) > 0).all() and len(stored["d2t"]) == 64
    state = state_of(straight)
    expected = state.average | {"fc.weight": state.average["fc.weight"] * state.feature_scale}
    assert all(np.array_equal(stored[name], value.numpy()) for name, value in expected.items())


def test_the_time_that_is_left_counts_what_text_takes(target, tmp_path):
    """Half an hour after the last step of an hour's run, say: text was generated since."""
    seen = []

    def watch(status):
        if status.what.startswith("generate shard 2"):
            seen.append(status)

    def stop():
        return bool(seen)

    settings = target.settings(tmp_path, tokens=None, hours=10.0, shard_size=4, passes=1)
    TrainingRun(settings, stop, watch).run(False)
    for status in seen:
        assert status.remaining_seconds == pytest.approx(36_000 - status.position.seconds)


def test_the_held_out_curve_has_a_point_of_every_sitting(target, tmp_path):
    """Stopped at once, and killed while the last measurement was made."""
    run = TrainingRun(target.settings(tmp_path), lambda: (tmp_path / HELD_OUT_FILE).is_file(), lambda status: None)
    assert run.run(False).position.step == 0
    train(target.settings(tmp_path), steps=1, resume=True)
    whole = (tmp_path / HELD_OUT_FILE).read_text()
    assert [row["step"] for row in read_rows(tmp_path / HELD_OUT_FILE)] == ["0", "1"]
    (tmp_path / HELD_OUT_FILE).write_text("".join(whole.splitlines(keepends=True)[:-1]))
    train(target.settings(tmp_path), steps=1, resume=True)
    lengths = [row["accepted_length"] for row in read_rows(tmp_path / HELD_OUT_FILE)]
    assert lengths == [line.split(",")[3] for line in whole.splitlines()[1:]]


def test_rows_behind_the_checkpoint_are_dropped(tmp_path):
    curve = Curve(tmp_path / "c.csv", ("step", "loss"), 0)
    for step in range(1, 6):
        curve.add(step, 1.0 / step)
    with (tmp_path / "c.csv").open("a") as stream:
        stream.write("6")  # cut by a kill
    before = tmp_path / "before.csv"
    before.hardlink_to(tmp_path / "c.csv")
    Curve(tmp_path / "c.csv", ("step", "loss"), 3).add(4, 0.5)
    assert read_rows(tmp_path / "c.csv") == [
        {"step": "1", "loss": "1"},
        {"step": "2", "loss": "0.5"},
        {"step": "3", "loss": "0.333333"},
        {"step": "4", "loss": "0.5"},
    ]
    assert len(read_rows(before)) == 5, "a kill meanwhile would have lost them"


def test_curves_are_drawn_with_other_held_out_text(tmp_path, monkeypatch):
    """Another --corpus may have other domains: rows from before it have no value there."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    Curve(tmp_path / STEPS_FILE, STEP_COLUMNS, 0).add(1, *[1.0] * 9)
    Curve(tmp_path / HELD_OUT_FILE, held_out_columns(1, ("code",)), 0).add(1, 1, 1.0, 1.5, 0.5, 1.5)
    Curve(tmp_path / HELD_OUT_FILE, held_out_columns(1, ("code", "maths")), 1).add(2, 2, 2.0, 2.0, 0.5, 1.5, 2.5)
    drawn = {}
    plot = Axes.plot

    def note(self, x, y, **style):
        drawn[style["label"]] = y
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", note)
    draw_curves(tmp_path)
    assert set(drawn) == {"loss", "l1", "confidence", "all", "code", "maths"}
    assert np.array_equal(drawn["maths"], [float("nan"), 2.5], equal_nan=True)


def test_without_torch_the_message_says_what_to_install(target, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from dspark_export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *target.command_line(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "training needs torch" in done.stderr and "Traceback" not in done.stderr


@dataclasses.dataclass(frozen=True)
class Learned:
    out: object
    first: float
    last: float
    seconds: float


@pytest.fixture(scope="module")
def learned(target, tmp_path_factory):
    """The tiny target's drafter after about a minute, through the command."""
    out = tmp_path_factory.mktemp("learned")
    options = {
        "tokens": 30_000, "rank": 16, "draft_vocab": 96, "shard_size": 32, "held_out": 12, "answer_tokens": 48,
        "prompt_tokens": 24, "anchors": 48, "learning_rate": 3e-3, "ema": 0.98, "warmup_steps": 20,
        "init_markov": "random",
    }  # fmt: skip
    begin = time.monotonic()
    done = CliRunner().invoke(app, target.command_line(out, **options), catch_exceptions=False)
    assert done.exit_code == 0
    rows = read_rows(out / HELD_OUT_FILE)
    first, last = (float(rows[index]["accepted_length"]) for index in (0, -1))
    return Learned(out, first, last, time.monotonic() - begin)


@pytest.mark.slow
def test_a_drafter_learns(learned):
    # Untrained, it copies the anchor through the embedding that it shares; this target often repeats a token.
    assert learned.first < 2.0
    assert learned.last > 2.5
    assert learned.seconds < 300
    distances = [float(row["l1"]) for row in read_rows(learned.out / STEPS_FILE)]
    assert np.mean(distances[-20:]) < 0.8 * np.mean(distances[:20])
    confidence = [float(row["confidence"]) for row in read_rows(learned.out / STEPS_FILE)]
    assert np.mean(confidence[-20:]) < np.mean(confidence[:5])
    assert (learned.out / PICTURE_FILE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_the_engine_accepts_what_was_predicted(target, learned, tmp_path):
    export_drafter(DrafterExport(learned.out, target.verifier, tmp_path / "drafter"), lambda what, done: None)
    dialogues = load_shard(learned.out / "corpus" / "shard-00000.npz")
    driver = SpeculatingDriver(target.verifier, tmp_path / "drafter", policy="fixed:64", max_slots=4)
    sinks = driver.run(
        *(
            GenerationRequest(input_ids=tuple(dialogue.tokens[: dialogue.prompt_length].tolist()), max_tokens=48)
            for dialogue in dialogues
        )
    )
    for sink, dialogue in zip(sinks, dialogues, strict=True):
        assert sink.tokens() == dialogue.tokens[dialogue.prompt_length :].tolist(), "speculation is lossless"
    served = RoundTable.of(driver.records).accepted_length
    # The engine does not report rounds that had nothing to draft: at most one an answer, of length 1.
    assert served == pytest.approx(learned.last, rel=0.05)
    assert served > 2.5
