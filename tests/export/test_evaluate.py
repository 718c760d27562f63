"""Evaluation and calibration of observed rounds: numbers by hand, synthetic drafters, tables, and figures with ink."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from dspark_backend.calibration import Calibration, Scaling, sigmoid
from dspark_backend.scheduling import DraftRound, Threshold
from dspark_backend.telemetry import RoundRecord
from dspark_export.calibrate import calibrate, calibration_table, reliability_curves
from dspark_export.errors import ExportError
from dspark_export.evaluate import (
    THRESHOLDS,
    accepted_length_table,
    accepted_lengths,
    conditional_acceptance,
    conditional_acceptance_table,
    threshold_sweep,
    threshold_table,
)
from dspark_export.figures import draw_conditional_acceptance, draw_reliability, draw_threshold_sweep
from dspark_export.rounds import RoundTable

HASH = "ab" * 32


def record(verified, accepted, request=0, sampled=False, logits=(0.0, 0.0, 0.0)):
    return RoundRecord(np.array(logits, dtype=np.float32), sampled, verified, accepted, request)


def synthetic(temperatures, count, sampled=False, seed=0, first_request=0, requests=20):
    """Rounds of a drafter whose confidences are off by known temperatures, whole blocks verified."""
    random = np.random.default_rng(seed)
    logits = random.normal(1.0, 2.5, (count, len(temperatures))).astype(np.float32)
    stands = random.random(logits.shape) < sigmoid(logits / np.array(temperatures))
    accepted = np.cumprod(stands, axis=1).sum(axis=1).tolist()
    return [
        record(len(temperatures), accepted[index], first_request + index % requests, sampled, logits[index])
        for index in range(count)
    ]


def text_of(table):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(table)
    return console.export_text()


def test_a_table_of_rounds():
    table = RoundTable.of([record(3, 2), record(3, 0, request=4, sampled=True), record(1, 1, request=4)])
    assert len(table) == 3 and table.block_size == 3 and table.num_requests == 2
    assert table.accepted_length == 2.0
    assert table.confidence_logits.dtype == np.float32 and table.confidence_logits.shape == (3, 3)
    assert table.regime(True).accepted.tolist() == [0] and len(table.regime(False)) == 2
    assert math.isnan(table.where(np.zeros(3, bool)).accepted_length)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "at least one observed round"),
        ([record(2, 1), record(2, 1, logits=(0.0, 0.0))], "block sizes 2, 3"),
        ([record(1, 2)], "0 <= accepted <= verified <= 3"),
        ([record(4, 2)], "0 <= accepted <= verified <= 3"),
        ([record(2, -1)], "0 <= accepted <= verified <= 3"),
    ],
)
def test_rounds_that_cannot_be_are_refused(records, message):
    with pytest.raises(ExportError, match=message):
        RoundTable.of(records)


def test_accepted_length_by_file():
    math_rounds = RoundTable.of([record(3, 3), record(3, 2, 1), record(3, 1, 1), record(3, 0, 2)])
    chat_rounds = RoundTable.of([record(3, 0), record(3, 1)])
    rows = accepted_lengths({"math.jsonl": math_rounds, "chat.jsonl": chat_rounds})
    assert [(row.name, row.requests, row.rounds, row.accepted_length) for row in rows] == [
        ("math.jsonl", 3, 4, 2.5),
        ("chat.jsonl", 1, 2, 1.5),
    ]
    text = text_of(accepted_length_table(rows))
    for word in ("math.jsonl", "chat.jsonl", "2.500", "1.500", "mean", "2.000"):
        assert word in text


def test_conditional_acceptance_counts_only_what_was_reached_and_verified():
    rounds = RoundTable.of([record(3, 3), record(3, 2), record(3, 0), record(1, 1), record(2, 1)])
    rows = conditional_acceptance(rounds)
    assert [(row.position, row.count) for row in rows] == [(1, 5), (2, 3), (3, 2)]
    assert [row.rate for row in rows] == pytest.approx([4 / 5, 2 / 3, 1 / 2])
    never = conditional_acceptance(RoundTable.of([record(3, 0)]))
    assert never[0].rate == 0.0 and math.isnan(never[1].rate) and never[1].count == 0
    text = text_of(conditional_acceptance_table({"math": rows, "chat": never}))
    assert "0.800" in text and "0.667" in text and "-" in text


def test_a_sweep_by_hand():
    # Survival of the two rounds: .881, .776, .683 and .5, .059, .007.
    logits = [(2.0, 2.0, 2.0), (0.0, -2.0, -2.0)]
    rounds = RoundTable.of([record(3, 2, logits=logits[0]), record(3, 1, logits=logits[1])])
    rows = threshold_sweep(rounds, Calibration.identity(3), (0.0, 0.5, 0.7, 0.85, 0.95))
    assert [row.verified_length for row in rows] == pytest.approx([4.0, 3.0, 2.0, 1.5, 1.0])
    assert [row.accepted_length for row in rows] == pytest.approx([2.5, 2.5, 2.0, 1.5, 1.0])
    assert rows[0].verified_per_accepted == pytest.approx(1.6)
    text = text_of(threshold_table(rows))
    assert "0.85" in text and "1.600" in text
    # Nearly certain confidences: another calibration verifies more.
    sure = threshold_sweep(rounds, Calibration(Scaling((0.1,) * 3), Scaling.identity(3)), (0.95,))
    assert sure[0].verified_length == pytest.approx(2.5)


def test_the_sweep_is_what_the_policy_would_do():
    rounds = RoundTable.of([*synthetic((1.0, 2.0, 1.0, 3.0), 500), record(2, 1, logits=(5, 5, 5, 5))])
    calibration = Calibration(Scaling((1.0, 1.5, 0.7, 2.0)), Scaling.identity(4))
    survival = calibration.survival(rounds.confidence_logits, rounds.sampled)
    for row in threshold_sweep(rounds, calibration):
        draft_round = DraftRound(survival, survival, rounds.verified, np.ones(5 * len(rounds)), len(rounds))
        depths = Threshold(row.threshold).depths(draft_round)
        assert row.verified_length == pytest.approx(depths.mean() + 1)
        assert row.accepted_length == pytest.approx(np.minimum(depths, rounds.accepted).mean() + 1)


def test_a_higher_threshold_verifies_less_and_wastes_less():
    rounds = RoundTable.of(synthetic((1.0, 1.0, 1.0, 1.0, 1.0), 4000))
    rows = threshold_sweep(rounds, Calibration.identity(5))
    assert tuple(row.threshold for row in rows) == THRESHOLDS and THRESHOLDS[-1] == 0.95
    assert rows[0].verified_length == 6.0 and rows[0].accepted_length == rounds.accepted_length
    for key in ("verified_length", "accepted_length", "verified_per_accepted"):
        values = [getattr(row, key) for row in rows]
        assert all(later <= earlier + 1e-9 for earlier, later in pairwise(values)), key
    assert rows[-1].verified_per_accepted < 1.1 < 1.5 < rows[0].verified_per_accepted


def test_calibration_of_both_regimes_lowers_errors_on_held_out_requests():
    greedy, sampled = (3.0, 2.5, 2.0), (0.4, 0.5, 0.6)
    records = synthetic(greedy, 12_000) + synthetic(sampled, 12_000, sampled=True, seed=1, first_request=20)
    report = calibrate(RoundTable.of(records), HASH)
    assert report.calibration.notes == () and report.calibration.drafter_hash == HASH
    assert report.num_judged == 6000
    np.testing.assert_allclose(np.log(report.calibration.greedy.temperatures), np.log(greedy), atol=0.35)
    np.testing.assert_allclose(np.log(report.calibration.sampled.temperatures), np.log(sampled), atol=0.35)
    assert [(row.regime, row.position) for row in report.positions] == [
        (regime, position) for regime in ("greedy", "sampled") for position in (1, 2, 3)
    ]
    for row in report.positions:
        assert row.rounds == 3000
        assert row.error_after < 0.03 < 0.05 < row.error_before
        assert 0.65 < row.auc < 1.0 and 0.7 < row.conditional_auc < 1.0
    text = text_of(calibration_table(report.positions))
    assert "greedy" in text and "sampled" in text and f"{report.positions[0].error_before:.3f}" in text


def test_the_judging_requests_do_not_fit():
    """Every fourth request accepts nothing: the fit must not notice, its judgement must."""
    records = [
        record(3, 0 if one.request % 4 == 3 else one.accepted, one.request, False, one.confidence_logits)
        for one in synthetic((1.0, 1.0, 1.0), 20_000)
    ]
    report = calibrate(RoundTable.of(records), HASH)
    np.testing.assert_allclose(np.log(report.calibration.greedy.temperatures), 0.0, atol=0.3)
    assert report.positions[0].error_after > 0.4 and math.isnan(report.positions[0].auc)


def test_what_could_not_be_fitted_is_noted():
    few = calibrate(RoundTable.of(synthetic((3.0, 3.0), 2000, requests=3)), HASH)
    assert few.num_judged == 2000 and few.calibration.greedy.temperatures[0] > 2.0
    assert few.calibration.sampled == Scaling.identity(2)
    assert any("fewer than 4 requests" in note for note in few.calibration.notes)
    assert any(note.startswith("sampled: no rounds") for note in few.calibration.notes)
    tiny = calibrate(RoundTable.of(synthetic((3.0, 3.0), 30)), HASH)
    assert tiny.calibration.greedy == Scaling.identity(2)
    assert any("greedy, position 2: " in note for note in tiny.calibration.notes)
    shallow = calibrate(RoundTable.of([record(1, index % 2, index % 8) for index in range(800)]), HASH)
    assert math.isnan(shallow.positions[2].error_after) and shallow.positions[2].rounds == 0
    assert "-" in text_of(calibration_table(shallow.positions))


def test_reliability_curves_cover_what_was_verified():
    records = synthetic((1.0, 1.0), 300) + [record(1, 1, 99, True, (1.0, 1.0)) for _ in range(7)]
    curves = reliability_curves(RoundTable.of(records), Calibration.identity(2))
    assert [(curve.regime, curve.position) for curve in curves] == [("greedy", 1), ("greedy", 2), ("sampled", 1)]
    assert [sum(row.count for row in curve.rows) for curve in curves] == [300, 300, 7]


def image(png):
    from matplotlib.image import imread

    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return imread(png)[:, :, :3]


def coloured(pixels):
    """How many pixels are neither white, grey nor black."""
    return int((pixels.max(axis=2) - pixels.min(axis=2) > 0.2).sum())


def test_the_reliability_diagram(tmp_path):
    records = synthetic((3.0, 3.0, 3.0), 3000) + synthetic((0.5,) * 3, 3000, True, 1, 20)
    report = calibrate(RoundTable.of(records), HASH)
    both, one = tmp_path / "new" / "both.png", tmp_path / "greedy.png"
    draw_reliability(both, report.before, report.after)
    greedy = [[curve for curve in curves if curve.regime == "greedy"] for curves in (report.before, report.after)]
    draw_reliability(one, *greedy)
    assert coloured(image(both)) > 1.5 * coloured(image(one)) > 1000
    assert image(both).shape[0] > image(one).shape[0]
    with pytest.raises(ExportError, match="reliability curve"):
        draw_reliability(one, (), ())


def test_the_conditional_acceptance_figure(tmp_path):
    rows = conditional_acceptance(RoundTable.of(synthetic((1.0,) * 5, 500)))
    never = conditional_acceptance(RoundTable.of([record(5, 0, logits=(0.0,) * 5)]))
    draw_conditional_acceptance(tmp_path / "one.png", {"math": rows})
    draw_conditional_acceptance(tmp_path / "two.png", {"math": rows, "chat": never, "code": rows[:3]})
    assert coloured(image(tmp_path / "two.png")) > coloured(image(tmp_path / "one.png")) > 300
    with pytest.raises(ExportError, match="prompt file"):
        draw_conditional_acceptance(tmp_path / "none.png", {})
    assert not (tmp_path / "none.png").exists()


def test_the_threshold_figure(tmp_path):
    rows = threshold_sweep(RoundTable.of(synthetic((1.0,) * 5, 500)), Calibration.identity(5))
    draw_threshold_sweep(tmp_path / "sweep.png", rows)
    assert coloured(image(tmp_path / "sweep.png")) > 800
    with pytest.raises(ExportError, match="threshold"):
        draw_threshold_sweep(tmp_path / "none.png", [])


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    for name in [module for module in sys.modules if module.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows = threshold_sweep(RoundTable.of([record(3, 1)]), Calibration.identity(3))
    with pytest.raises(ExportError, match=r"dspark-triton\[plot\]"):
        draw_threshold_sweep(tmp_path / "sweep.png", rows)
