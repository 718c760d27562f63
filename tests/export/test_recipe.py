"""The recipe of the shipped drafter: its script, and its comparison of short runs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import typer
from training import SMALL, tiny_target, train

from dspark_export.training.checkpoint import CHECKPOINT_FILE

RECIPE = Path(__file__).parents[2] / "export" / "recipes" / "smollm2"
COMMAND = """#!/usr/bin/env bash
# dspark-export, as far as who starts when.
case $1 in
corpus) sleep 0.5; echo $$ > "$5/writer.lock"; exec sleep 60 ;;
train) cp "$7/corpus/writer.lock" "$7/seen" ;;
esac
"""


@pytest.fixture
def ablate(monkeypatch):
    spec = spec_from_file_location("ablate", RECIPE / "ablate.py")
    module = module_from_spec(spec)
    # Its dataclasses look for it there.
    monkeypatch.setitem(sys.modules, "ablate", module)
    spec.loader.exec_module(module)
    return module


def test_started_again_the_script_still_waits_for_its_writer(tmp_path):
    """The lock file is there from the time before; only a lock says who writes."""
    command = tmp_path / "bin" / "dspark-export"
    command.parent.mkdir()
    command.write_text(COMMAND)
    command.chmod(0o755)
    lock = tmp_path / "run" / "corpus" / "writer.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("1\n")
    done = subprocess.run(
        [RECIPE / "train.sh", "verifier", tmp_path / "run", "1"],
        env={**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "seen").read_text() == lock.read_text() != "1\n"


def test_an_interrupted_variant_begins_anew(ablate, tmp_path, monkeypatch):
    target = tiny_target(tmp_path)
    train(target.settings(tmp_path / "run"), steps=1)
    sizes = {name: SMALL[name] for name in ("answer_tokens", "prompt_tokens")}
    monkeypatch.setattr(ablate, "CorpusSettings", functools.partial(ablate.CorpusSettings, **sizes))
    text = ablate.Text.fixed(tmp_path / "run" / "corpus", tmp_path / "out" / "corpus", 1)
    ablation = ablate.Ablation(target.verifier, str(target.model), text, tmp_path / "out", 2, 1)
    names = ("rank", "layers", "draft_vocab", "anchors", "dialogues_per_step", "precision", "dtype")
    variant = ablate.Variant("small", {name: SMALL[name] for name in names} | {"target_layer_ids": None})
    (tmp_path / "out" / "small").mkdir()
    (tmp_path / "out" / "small" / CHECKPOINT_FILE).write_bytes((tmp_path / "run" / CHECKPOINT_FILE).read_bytes())
    result = ablation.run(variant)
    assert result.steps >= 2 and result == ablation.run(variant), "a finished one is read"
    assert "| small |" in ablate.table([result], text)


def test_a_variant_that_there_is_not_is_named(ablate, tmp_path):
    with pytest.raises(typer.BadParameter, match="expected names of variants, got tap 28"):
        ablate.main(tmp_path, tmp_path, tmp_path / "out", only=["tap 28", "base"])
