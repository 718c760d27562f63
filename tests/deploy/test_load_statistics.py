"""What the load report computes: intervals, throughput, rows, comparisons, the journal."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from dspark_load import interval, options, prompts, report
from dspark_load.__main__ import Campaign
from dspark_load.answer import Answer
from dspark_load.cell import Cell, Load, default_policies, order
from dspark_load.comparison import LEVELS, against_best, at, frontier, matched, quotient
from dspark_load.errors import LoadError
from dspark_load.journal import Journal
from dspark_load.limits import Limits
from dspark_load.row import rows
from dspark_load.segment import Segment
from dspark_load.throughput import measured

LIMITS = Limits(ttft=0.5, itl=0.05)
TOKENS = 21


def answer(sent: float = 0.0, ttft: float = 0.1, itl: float = 0.01, rounds: int = 10, verified: int = 20) -> Answer:
    return Answer(sent, sent + ttft, sent + ttft + itl * (TOKENS - 1), TOKENS, rounds, verified, 10, "math")


def segment(policy: str, streams: int, itls: list[float], part: int = 0, mode: str = "closed") -> Segment:
    """Each stream answers one request after another; arrivals are even."""
    latency = 0.1 + (TOKENS - 1) * float(np.mean(itls))
    end = 10 * latency
    per_slice = round(streams * TOKENS * 10 / 8)
    cell = Cell(policy, Load(mode, float(streams)))
    return Segment(cell, part, [answer(itl=itl) for itl in itls], end, [per_slice] * 8)


class TestInterval:
    def test_covers_the_mean_as_often_as_it_says(self):
        random = np.random.default_rng(3)
        hits = 0
        for _ in range(200):
            found = interval.estimate(random.normal(5.0, 2.0, 40).tolist(), interval.mean)
            hits += found.low <= 5.0 <= found.high
        assert 0.88 <= hits / 200 <= 0.99

    def test_width_shrinks_with_the_root_of_the_sample(self):
        values = np.random.default_rng(4).normal(0.0, 1.0, 1600)
        small, large = (interval.estimate(values[:n].tolist(), interval.mean) for n in (100, 1600))
        assert (small.high - small.low) / (large.high - large.low) == pytest.approx(4.0, rel=0.3)

    def test_quotient_draws_pairs(self):
        tops, bottoms = [1.0, 20.0, 300.0], [2.0, 40.0, 600.0]
        assert interval.resampled_quotient(tops, bottoms) == pytest.approx(np.full(interval.RESAMPLES, 0.5))

    def test_parts_are_drawn_before_their_values(self):
        """What slows the machine for a part slows all its answers: 40 of them are no 40 observations."""
        values = [1.0] * 20 + [2.0] * 20
        found = interval.estimate(values, interval.mean, (20, 20))
        assert (found.low, found.value, found.high) == (1.0, 1.5, 2.0)
        assert interval.estimate(values, interval.mean).high < 1.7

    def test_students_quantiles(self):
        for freedom, expected in ((4, 2.776), (7, 2.365), (11, 2.201), (30, 2.042)):
            assert interval.student(freedom) == pytest.approx(expected, rel=0.005)

    def test_nothing_has_no_estimate(self):
        with pytest.raises(ValueError, match="at least one"):
            interval.estimate([], interval.mean)


class TestThroughput:
    def test_is_tokens_over_the_windows(self):
        mine = [segment("off", 4, [0.01, 0.01]), segment("off", 4, [0.02, 0.02], part=1)]
        found = measured(mine)
        assert found.value == pytest.approx(2 * 840 / (3.0 + 5.0))
        assert found.estimate.low < found.value < found.estimate.high

    def test_equal_answers_leave_no_doubt(self):
        found = measured([segment("off", 4, [0.01] * 6)]).estimate
        assert found.low == pytest.approx(found.value) == pytest.approx(found.high)

    def test_covers_machines_that_change_from_part_to_part(self):
        random, hits, runs = np.random.default_rng(1), 0, 50
        for _ in range(runs):
            paces = random.normal(1.0, 0.15, 6)
            mine = [paced(part, pace, random.lognormal(0.0, 0.3, 24)) for part, pace in enumerate(paces)]
            found = measured(mine).estimate
            hits += found.low <= 4 * TOKENS / (0.1 + 0.01 * (TOKENS - 1)) <= found.high
        assert hits / runs >= 0.8

    def test_what_slows_a_part_alike_is_no_doubt_about_a_ratio(self):
        """The policies of a part are measured within a minute or two."""
        equal = np.ones(24)
        off, causal = ([paced(part, slow * pace, equal) for part, pace in enumerate((1, 2, 4))] for slow in (2, 1))
        found = measured(causal, 1).over(measured(off, 2))
        assert (found.low, found.value, found.high) == pytest.approx((2.0, 2.0, 2.0))
        assert measured(off).estimate.low < 0.7 * measured(off).value

    def test_the_same_arrivals_again_narrow_nothing(self):
        """perf_analyzer draws the arrivals of an open loop alike for every part."""
        burst = [0, 40, 10, 0, 90, 20, 0, 60]
        mine = [replace(segment("off", 2, [0.01], part, "open"), slices=burst) for part in range(9)]
        once, often = (measured(mine[:parts]).estimate for parts in (1, 9))
        assert (often.low, often.value, often.high) == pytest.approx((once.low, once.value, once.high))


def paced(part: int, pace: float, spread: np.ndarray) -> Segment:
    """Four streams on a machine that takes ``pace`` times as long; answers' ITLs are spread about their mean."""
    answers = [answer(ttft=0.1 * pace, itl=0.01 * pace * own) for own in spread / np.mean(spread)]
    end = 10 * 0.3 * pace
    return Segment(Cell("off", Load("closed", 4.0)), part, answers, end, [round(4 * TOKENS * 10 / 8)] * 8)


class TestRows:
    def test_one_cell(self):
        (row,) = rows([segment("causal", 2, [0.01, 0.02, 0.06])], LIMITS)
        assert row.answers == 3
        assert row.per_user.value == pytest.approx(50.0)
        assert row.ttft_ms.value == pytest.approx(100.0)
        assert row.itl_ms.value == pytest.approx(20.0)
        assert row.met == pytest.approx(2 / 3)
        assert row.accepted_length == pytest.approx(2.0)
        assert row.budget.value == pytest.approx(3.0)
        assert row.goodput == pytest.approx(row.met * row.aggregate.value / TOKENS)

    def test_the_budget_is_that_of_a_round(self):
        """Answers of many rounds count as much more than those of few: so does the accepted length beside it."""
        few, many = answer(rounds=2, verified=10), answer(rounds=20, verified=0)
        (row,) = rows([replace(segment("causal", 1, [0.01]), answers=[few, many])], LIMITS)
        assert row.budget.value == pytest.approx(1 + 10 / 22)
        assert row.accepted_length == pytest.approx(40 / 22)

    def test_the_ninth_of_ten_is_the_90th_percentile(self):
        answers = [answer(ttft=second / 10) for second in range(1, 11)]
        (row,) = rows([replace(segment("off", 1, [0.01]), answers=answers)], LIMITS)
        assert 900 <= row.ttft_p90_ms < 1000

    def test_goodput_of_an_open_loop_is_of_its_arrivals(self):
        """One answer that takes long costs itself; it does not stretch the time in which the others came."""
        arrived = [answer(sent=0.5 * index) for index in range(9)]
        late = answer(sent=4.5, itl=1.0)
        mine = replace(segment("off", 2, [0.01], mode="open"), answers=[*arrived, late], end=late.last)
        (row,) = rows([mine], LIMITS)
        assert row.requests == pytest.approx(2.0)
        assert row.goodput == pytest.approx(0.9 * 2.0)

    def test_limits_are_inclusive(self):
        assert answer(ttft=0.5, itl=0.04).meets(0.5, 0.05)
        assert not answer(ttft=0.51, itl=0.04).meets(0.5, 0.05)
        assert not answer(ttft=0.4, itl=0.06).meets(0.5, 0.05)


class TestComparison:
    def test_against_the_best_of_the_others(self):
        segments = [
            segment("off", 1, [0.02] * 5),
            segment("fixed:1", 1, [0.016] * 5),
            segment("causal", 1, [0.01] * 5),
            segment("lagged", 1, [0.02] * 5),
            segment("causal", 2, [0.01] * 5),
            segment("off", 3, [0.02] * 5, mode="open"),
            segment("causal", 3, [0.02] * 5, mode="open"),
        ]
        found = against_best(segments)
        assert [(one.policy, one.best, one.load.value) for one in found] == [
            ("causal", "fixed:1", 1.0),
            ("lagged", "fixed:1", 1.0),
        ]
        assert found[0].ratio.value == pytest.approx(0.42 / 0.30)
        assert found[1].ratio.value == pytest.approx(0.42 / 0.50)

    def test_a_quotient_is_the_geometric_mean_over_the_parts_that_both_have(self):
        ours = [segment("causal", 1, [itl] * 5, part) for part, itl in enumerate((0.01, 0.02, 0.04))]
        theirs = [segment("off", 1, [itl] * 5, part) for part, itl in enumerate((0.02, 0.02))]
        slower, equal = (0.1 + 20 * 0.02) / (0.1 + 20 * 0.01), 1.0
        assert quotient(ours, theirs).value == pytest.approx((slower * equal) ** 0.5)
        alone = quotient(ours[2:], theirs)
        assert alone.value == pytest.approx(0.5 / 0.9)

    def test_a_quotient_is_covered_whatever_the_answers_lengths_say(self):
        """Answers differ by a third, alike for both; what tells is how alike the machine was for both of a part."""
        random, hits, widths, pooled, runs = np.random.default_rng(5), 0, [], [], 60
        for _ in range(runs):
            ours, theirs = [], []
            for part in range(8):
                spread = random.lognormal(0.0, 0.3, 24)
                pace = random.normal(1.0, 0.2)
                ours.append(paced(part, pace * random.lognormal(0.0, 0.04), spread))
                theirs.append(paced(part, pace * random.lognormal(0.0, 0.04), spread))
            found = quotient(ours, theirs)
            hits += found.low <= 1.0 <= found.high
            widths.append(found.high - found.low)
            whole = measured(ours, 0).over(measured(theirs, 1))
            pooled.append(whole.high - whole.low)
        assert hits / runs >= 0.88
        assert np.median(widths) < np.median(pooled)

    def test_frontier_drops_what_another_point_beats(self):
        points = [(10.0, 10.0), (20.0, 8.0), (18.0, 7.0), (30.0, 3.0), (30.0, 2.0)]
        assert frontier(points) == [(10.0, 10.0), (20.0, 8.0), (30.0, 3.0)]

    def test_between_points_by_straight_lines(self):
        assert at([(10.0, 10.0), (20.0, 8.0)], [15.0, 20.0]) == pytest.approx([9.0, 8.0])

    def test_matched_throughput(self):
        segments = []
        for streams in (1, 2, 4):
            segments.append(segment("off", streams, [0.005 + 0.005 * streams] * 4))
            segments.append(segment("causal", streams, [0.0025 + 0.0025 * streams] * 4))
        lines = rows(segments, LIMITS)
        (found,) = matched(segments)
        assert (found.policy, found.base) == ("causal", "off")
        ours, theirs = ({r.aggregate.value for r in lines if r.cell.policy == p} for p in ("causal", "off"))
        assert found.levels[0] == pytest.approx(max(min(ours), min(theirs)))
        assert found.levels[-1] == pytest.approx(min(max(ours), max(theirs)))
        assert len(found.ratios) == LEVELS
        assert all(ratio > 1.3 for ratio in found.ratios)
        assert found.gain is not None and found.gain.value == pytest.approx(np.median(found.ratios))
        assert found.gain.low == pytest.approx(found.gain.high), "equal answers leave no doubt"

    def test_the_gain_of_users_is_as_sure_as_its_points(self):
        segments = []
        for streams in (1, 2, 4):
            segments.append(segment("off", streams, [0.02 * streams**0.5] * 4))
            segments.append(segment("causal", streams, [0.006 * streams**0.5, 0.014 * streams**0.5] * 8))
        (found,) = matched(segments)
        assert found.gain is not None and found.gain.low < found.gain.value - 0.1
        assert found.gain.high > found.gain.value + 0.1
        value, low, high = (100 * (x - 1) for x in (found.gain.value, found.gain.low, found.gain.high))
        assert f"{value:+.0f}% [{low:+.0f}%, {high:+.0f}%]" in report.gains([found])

    def test_no_common_throughput(self):
        (found,) = matched([segment("off", 1, [0.5] * 4), segment("causal", 64, [0.01] * 4)])
        assert found.ratios == () and found.gain is None
        assert "no throughput that both reach" in report.gains([found])


def test_answers_have_different_lengths_of_the_mean_that_was_asked_for():
    asked = [(prompts.Prompt("math", f"{index}?"), "causal") for index in range(20)]
    lengths = [entry["max_tokens"][0] for entry in prompts.input_data(asked, 48, True)["data"]]
    assert sum(lengths) == 20 * 48 and min(lengths) == 24 and max(lengths) == 72
    # Of each domain, too, while three take turns.
    assert {tuple(sorted(lengths[domain:15:3])) for domain in range(3)} == {(24, 36, 48, 60, 72)}


class TestOrder:
    def test_every_policy_once_in_every_part(self):
        policies = default_policies(5)
        seen = [order(policies, part) for part in range(4)]
        assert all(sorted(names) == sorted(policies) for names in seen)
        assert len({names[0] for names in seen}) > 1

    def test_open_loops_may_have_fewer_parts(self, tmp_path):
        arguments = ["--url", "somewhere:8001", "--streams", "1", "--rates", "2", "--parts", "3"]
        closed, opened = Load("closed", 1.0), Load("open", 2.0)
        for more, expected in (
            ([], [(part, load) for part in range(3) for load in (closed, opened)]),
            (["--open-parts", "1"], [(0, closed), (0, opened), (1, closed), (2, closed)]),
        ):
            given = options.parse([*arguments, *more])
            assert Campaign(given, [], [], Journal(tmp_path / "segments.jsonl", {})).places() == expected

    def test_requests_of_a_load(self):
        for streams in (1, 2, 8, 64):
            assert Load("closed", streams).requests(8.0) >= max(streams + 8, 3 * streams)
        assert Load("open", 4.0).requests(8.0) == 32
        assert Load("open", 20.0).requests(0.5) == 20, "perf_analyzer refuses fewer requests than the rate"


class TestPrompts:
    def test_domains_take_turns(self, tmp_path):
        for domain in ("a", "b", "c"):
            lines = [json.dumps({"turns": [f"{domain} {number}"]}) for number in range(4)]
            (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        found = prompts.read(tmp_path, 1)
        assert [prompt.domain for prompt in found] == ["a", "b", "c"] * 4
        assert len({prompt.text for prompt in found}) == 12
        assert prompts.stretch(found, 10, 4) == [found[10], found[11], found[0], found[1]]

    @pytest.mark.parametrize("line", ["", "{}", '{"turns": []}', "text", '{"prompt": 3}'])
    def test_a_line_without_a_prompt_is_refused(self, tmp_path, line):
        (tmp_path / "math.jsonl").write_text(f"{line}\n")
        with pytest.raises(LoadError, match="expected"):
            prompts.read(tmp_path, 0)


class TestJournal:
    def test_goes_on_after_a_cut(self, tmp_path):
        path = tmp_path / "segments.jsonl"
        first, second = segment("off", 1, [0.01]), segment("causal", 1, [0.02])
        journal = Journal(path, {"tokens": 48})
        journal.add(first)
        journal.add(second)
        path.write_text(path.read_text()[:-20])
        again = Journal(path, {"tokens": 48})
        assert again.segments == [first]
        assert again.has(first.cell, 0)
        assert not again.has(second.cell, 0)
        again.add(second)
        assert Journal(path, {"tokens": 48}).segments == [first, second]

    def test_other_settings_need_another_folder(self, tmp_path):
        Journal(tmp_path / "segments.jsonl", {"tokens": 48})
        with pytest.raises(LoadError, match="begun with tokens 48"):
            Journal(tmp_path / "segments.jsonl", {"tokens": 64})


def test_the_page_names_a_loss():
    segments = [segment("off", 1, [0.01] * 4), segment("causal", 1, [0.02] * 4)]
    text = report.best(against_best(segments))
    assert "**no**" in text
    assert "0.600" in text
