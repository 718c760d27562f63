"""Losses, weights and schedules of training against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dspark_export.training.losses import (
    OUTSIDE,
    BlockTargets,
    LossWeights,
    block_losses,
    l1_distance,
    position_weights,
)
from dspark_export.training.picked import picked_log_probabilities
from dspark_export.training.schedule import average_decay, learning_rate, update_average

ONLY_CE = LossWeights(1.0, 0.0, 0.0)


def targets(probabilities, labels, weights):
    """The known tokens are the first ones of the draft vocabulary."""
    known = torch.tensor(probabilities)
    return BlockTargets(
        torch.arange(known.shape[-1]).expand(known.shape), known, torch.tensor(labels), torch.tensor(weights)
    )


def test_position_weights_fall_by_e_in_four_slots():
    weights = position_weights(5, 4.0)
    assert weights.tolist() == pytest.approx([1.0, 0.778801, 0.606531, 0.472367, 0.367879], abs=1e-6)


def test_distance_counts_what_cannot_be_proposed():
    draft = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    target = torch.tensor([[0.5, 0.5], [0.5, 0.2], [0.0, 0.0]])
    # |.25-.5| + |.75-.2| + .3 left = 1.1; nothing in common is 2.
    assert l1_distance(draft, target).tolist() == pytest.approx([0.0, 1.1, 2.0])


def test_the_distance_errs_upwards_by_at_most_twice_what_is_left():
    torch.manual_seed(0)
    draft, target = (3.0 * torch.randn(2, 50, 400)).softmax(-1)
    ids = target.topk(40, dim=-1).indices
    known = target.gather(-1, ids)
    error = l1_distance(draft.gather(-1, ids), known) - (draft - target).abs().sum(dim=-1)
    rest = 1.0 - known.sum(dim=-1)
    assert (error > -1e-5).all() and (error < 2.0 * rest + 1e-5).all()
    assert float(error.max()) > 1e-3, "nothing was left out: the test says nothing"


def test_picked_log_probabilities_and_their_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 30, requires_grad=True)
    ids = torch.randint(0, 30, (3, 4, 6))
    ids[..., 1] = ids[..., 0]  # the same token twice
    weights = torch.randn(3, 4, 6)
    picked, best = picked_log_probabilities(logits, ids)
    (picked * weights).sum().backward()
    found = logits.grad
    other = logits.detach().clone().requires_grad_()
    plain = other.log_softmax(-1).gather(-1, ids)
    (plain * weights).sum().backward()
    torch.testing.assert_close(picked, plain)
    torch.testing.assert_close(found, other.grad)
    torch.testing.assert_close(best, other.log_softmax(-1).amax(-1))


def test_a_block_by_hand():
    # One block of two slots; softmax([ln 3, 0]) = (3/4, 1/4) and softmax([0, 0]) = (1/2, 1/2).
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])
    confidence = torch.tensor([[0.0, 2.0]])
    wanted = targets([[[0.5, 0.3], [0.5, 0.5]]], [[0, 1]], [[1.0, 0.5]])
    losses = block_losses(logits, confidence, wanted, LossWeights())
    ce = -math.log(0.75) + 0.5 * math.log(2.0)
    l1 = (0.25 + 0.05 + 0.2) + 0.5 * 0.0
    # Acceptance 1 - .5/2 = .75 and 1; BCE of logit 0 is ln 2 whatever the label, of logit 2 and label 1 ln(1 + e^-2).
    bce = math.log(2.0) + 0.5 * math.log1p(math.exp(-2.0))
    assert float(losses.ce) == pytest.approx(ce, rel=1e-5)
    assert float(losses.l1) == pytest.approx(l1, rel=1e-5)
    assert float(losses.confidence) == pytest.approx(bce, rel=1e-5)
    assert float(losses.total) == pytest.approx(0.1 * ce + 0.9 * l1 + bce, rel=1e-5)


def test_slots_behind_the_end_and_labels_outside_the_vocabulary_count_nothing():
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    probabilities = torch.full((1, 3, 4), 0.25).tolist()
    whole = targets(probabilities, [[1, 2, 3]], [[1.0, 0.0, 0.0]])
    part = block_losses(logits, torch.zeros(1, 3), whole, LossWeights())
    alone = targets([probabilities[0][:1]], [[1]], [[1.0]])
    assert float(part.total) == pytest.approx(
        float(block_losses(logits[:, :1], torch.zeros(1, 1), alone, LossWeights()).total)
    )
    unknown = targets(probabilities, [[1, OUTSIDE, OUTSIDE]], [[1.0, 1.0, 1.0]])
    first = -float(logits[0, 0].log_softmax(-1)[1])
    assert float(block_losses(logits, torch.zeros(1, 3), unknown, ONLY_CE).total) == pytest.approx(first, rel=1e-5)


def test_the_confidence_does_not_train_the_distribution():
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    confidence = torch.zeros(1, 1, requires_grad=True)
    wanted = targets([[[0.9, 0.1]]], [[0]], [[1.0]])
    block_losses(logits, confidence, wanted, LossWeights(0.0, 0.0, 1.0)).total.backward()
    assert logits.grad is None or not logits.grad.any()
    # d BCE / d logit = sigmoid(0) - (1 - TV) = .5 - .6
    assert confidence.grad is not None and float(confidence.grad) == pytest.approx(-0.1)


def test_the_distance_pulls_towards_the_target():
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    wanted = targets([[[0.7, 0.2, 0.0]]], [[0]], [[1.0]])
    block_losses(logits, torch.zeros(1, 1), wanted, LossWeights(0.0, 1.0, 0.0)).total.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 0] < 0 < logits.grad[0, 0, 2]


def test_learning_rate():
    assert learning_rate(1.0, 0, 9, 0.0) == pytest.approx(0.1)
    assert learning_rate(1.0, 4, 9, 0.0) == pytest.approx(0.5)
    assert learning_rate(1.0, 9, 9, 0.0) == learning_rate(1.0, 500, 9, 0.0) == 1.0
    assert learning_rate(2.0, 500, 0, 0.5) == pytest.approx(2 * (0.05 + 0.95 * 0.5))
    assert learning_rate(1.0, 500, 9, 1.0) == pytest.approx(0.05) == learning_rate(1.0, 500, 9, 1.7)


def test_wsd_stays_at_the_peak_and_then_falls_to_nothing():
    def rate(step, progress):
        return learning_rate(2.0, step, 9, progress, "wsd", 0.25)

    assert rate(0, 0.0) == pytest.approx(0.2) and rate(9, 0.1) == 2.0 == rate(500, 0.75)
    assert rate(500, 0.875) == pytest.approx(1.0) and rate(500, 1.0) == 0.0 == rate(500, 1.2)
    # A budget that is made longer while the rate stays changes nothing; cosine would jump.
    assert rate(500, 0.6) == rate(500, 0.3)


def test_the_average_forgets_its_start_soon():
    assert average_decay(0.999, 0) == 0.1 and average_decay(0.999, 90) == 0.91
    assert average_decay(0.999, 10**6) == 0.999
    average = {"w": torch.tensor([1.0]), "d2t": torch.tensor([1])}
    update_average(average, {"w": torch.tensor([3.0]), "d2t": torch.tensor([7])}, 0.75)
    assert average["w"].tolist() == [1.5] and average["d2t"].tolist() == [7]
