"""The parts of the speed benchmarks that compute: choice of prompts, order of cells, rows of the table, the journal."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from bench_policies import order
from speed import markdown, policy_rows
from speed.journal import Cell, Journal, Segment
from speed.load import Answer, spread
from speed.prompts import DOMAINS, choose, split

OFF, ONE, CAUSAL = (Cell("float32", policy, 1) for policy in ("off", "fixed:1", "causal"))
CELLS = [OFF, ONE, CAUSAL]


@pytest.fixture
def folder(tmp_path):
    for domain in DOMAINS:
        lines = [json.dumps({"turns": [f"{domain} question {number}", "never asked"]}) for number in range(30)]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines))
    return tmp_path


def answer(prompt, decode_secs, rounds, verified=0, tokens_hash="a"):
    return Answer(prompt, 10, 101, 50.0, decode_secs, rounds, verified, 100 - rounds, tokens_hash)


def segment(cell, part, *answers, foreign=0.0):
    return Segment(cell, part, list(answers), 101 * len(answers), 5.0, foreign)


def run():
    """Two parts: off takes 2 s and 4 s, fixed:1 takes 1.6 s and 4 s, causal 1 s and 1 s."""
    return [
        segment(OFF, 0, answer("gsm8k/0", 2.0, 100)),
        segment(OFF, 1, answer("mbpp/1", 4.0, 100), foreign=0.5),
        segment(ONE, 0, answer("gsm8k/0", 1.6, 60, 60)),
        segment(ONE, 1, answer("mbpp/1", 4.0, 90, 90)),
        segment(CAUSAL, 0, answer("gsm8k/0", 1.0, 40, 120)),
        segment(CAUSAL, 1, answer("mbpp/1", 1.0, 40, 80)),
    ]


def test_prompts_are_the_seeds_and_every_part_is_mixed(folder):
    prompts = choose(folder, 10, seed=3)
    assert prompts == choose(folder, 10, seed=3) != choose(folder, 10, seed=4)
    assert len({prompt.name for prompt in prompts}) == 30
    assert prompts[0].chat == [{"role": "user", "content": f"gsm8k question {prompts[0].number}"}]
    parts = [split(prompts, 5, part, 1) for part in range(5)]
    assert [prompt for part in parts for prompt in part] == prompts
    assert all({prompt.domain for prompt in part} == set(DOMAINS) for part in parts)


def test_a_part_is_filled_up_to_the_streams(folder):
    prompts = choose(folder, 4, seed=0)
    last = split(prompts, 4, 3, 8)
    assert last == prompts[9:] + prompts[:5]
    assert len(split(prompts, 4, 0, 100)) == 12


def test_too_few_prompts_are_said(folder):
    with pytest.raises(SystemExit, match="expected at least 31 prompts, got 30"):
        choose(folder, 31, seed=0)


def test_every_cell_has_its_turn_in_each_part_and_not_always_the_same_neighbours():
    orders = [order(CELLS, part, 1) for part in range(4)]
    assert all(sorted(map(str, found)) == sorted(map(str, CELLS)) for found in orders)
    assert orders[0] != orders[1]


def test_rows():
    off, one, causal = policy_rows.rows(CELLS, run())
    assert off.per_user == pytest.approx((50 + 25) / 2)
    assert (off.to_off, off.accepted_length, off.budget) == (1.0, 1.0, 1.0)
    assert one.to_off == pytest.approx((2 / 1.6 + 1) / 2), "the median of the parts, not the ratio of the medians"
    assert causal.to_off == pytest.approx((2 + 4) / 2)
    assert causal.to_fixed1 == pytest.approx((1.6 + 4) / 2)
    assert causal.accepted_length == pytest.approx(200 / 80)
    assert causal.budget == pytest.approx(1 + 200 / 80)
    assert causal.aggregate == pytest.approx(101 / 5)
    assert (off.noisy, causal.noisy) == (1, 0)


def test_nothing_to_compare_with_is_no_ratio():
    (causal,) = policy_rows.rows([CAUSAL], [one for one in run() if one.cell == CAUSAL])
    assert math.isnan(causal.to_off)
    assert markdown.number(causal.to_off, 2) == ""


def test_domain_rows():
    found = {(row.cell, row.domain): row for row in policy_rows.domain_rows(CELLS, run(), 1)}
    assert len(found) == 6
    assert found[CAUSAL, "mbpp"].to_off == pytest.approx(4.0)
    assert found[ONE, "gsm8k"].accepted_length == pytest.approx(100 / 60)


def test_another_answer_is_found():
    segments = run()
    assert policy_rows.unequal_prompts(segments) == (0, 2)
    other = [replace(one, tokens_hash="b") for one in segments[-1].answers]
    assert policy_rows.unequal_prompts([*segments[:-1], replace(segments[-1], answers=other)]) == (1, 2)


def test_a_cut_journal_goes_on(tmp_path):
    path = tmp_path / "segments.jsonl"
    journal = Journal(path, {"tokens": 101})
    for one in run():
        journal.add(one)
    path.write_bytes(path.read_bytes()[:-20])
    again = Journal(path, {"tokens": 101})
    assert again.segments == run()[:-1]
    assert again.complete_parts(CELLS) == [0]
    again.add(run()[-1])
    assert Journal(path, {"tokens": 101}).complete_parts(CELLS) == [0, 1]


def test_a_journal_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "segments.jsonl"
    Journal(path, {"tokens": 101}).add(run()[0])
    with pytest.raises(SystemExit, match="begun with tokens 101, now it is 64"):
        Journal(path, {"tokens": 64})


def test_streams_begin_one_after_another():
    assert spread(128, 4) == [32, 64, 96, 128]
    assert spread(128, 1) == [0]
    assert spread(4, 16)[:4] == [0, 0, 0, 1]


def test_markdown_lines_up():
    text = markdown.table(["name", "value"], [["a", "1.0"], ["long name", "100.25"]], left=1)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert text.splitlines()[1] == "| --------- | -----: |"
