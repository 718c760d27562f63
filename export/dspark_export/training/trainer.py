"""One training step: several dialogues, random anchors in each, teacher-forced blocks, and an optimiser."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dspark_export.torch_drafter import TorchDrafter
from dspark_export.training.batch import Example, draft_index, pack, pick_anchors
from dspark_export.training.losses import LossWeights, block_losses, position_weights
from dspark_export.training.optimisers import Optimisers
from dspark_export.training.schedule import average_decay, update_average
from dspark_export.training.settings import TrainSettings

_BLOCKS_AT_ONCE = 64
"""Logits of so many blocks are alive at a time: they stay in the processor's cache."""


@dataclass(frozen=True)
class StepReport:
    """Means over the slots of a step."""

    loss: float
    ce: float
    l1: float
    confidence: float
    matched: float
    """How often the most probable token was the text's."""
    gradient_norm: float
    """Before clipping."""


def faster_precision() -> str:
    """``bfloat16`` where this machine multiplies it faster than ``float32``."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones((256, 512), dtype=dtype), torch.ones((2048, 512), dtype=dtype)
        nn.functional.linear(left, right)
        begin = time.perf_counter()
        for _ in range(5):
            nn.functional.linear(left, right)
        seconds[dtype] = time.perf_counter() - begin
    return "bfloat16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "float32"


class Trainer:
    """A drafter that learns, its running average and the optimiser between them."""

    def __init__(
        self,
        drafter: TorchDrafter,
        average: TorchDrafter,
        columns: Tensor | None,
        settings: TrainSettings,
        precision: str,
    ) -> None:
        """``columns`` int64: the features that the drafter reads of those recorded; None for all."""
        self.drafter = drafter
        self.average = average
        self._columns = columns
        self._settings = settings
        self._precision = precision
        self._losses = LossWeights(
            settings.ce_weight, settings.l1_weight, settings.confidence_weight, settings.distribution_weight
        )
        self._slot_weights = position_weights(settings.block_size, settings.position_decay)
        self._index = draft_index(drafter)
        self.optimisers = Optimisers(drafter, settings)

    def step(self, examples: Sequence[Example], random: np.random.Generator, rate: float, number: int) -> StepReport:
        """Train on random anchors of each dialogue. ``number`` counts steps from 0."""
        self.optimisers.set_rate(rate)
        self.optimisers.zero_grad()
        loss, ce, l1, confidence, matched = self.accumulate(examples, random)
        norm = float(nn.utils.clip_grad_norm_(self.drafter.parameters(), self._settings.clip))
        if not np.isfinite(norm):
            raise FloatingPointError(f"step {number}: the gradient is not finite; train with a lower --learning-rate")
        self.optimisers.step()
        update_average(self.average.state_dict(), self.drafter.state_dict(), average_decay(self._settings.ema, number))
        return StepReport(loss, ce, l1, confidence, matched, norm)

    def accumulate(self, examples: Sequence[Example], random: np.random.Generator) -> tuple[float, ...]:
        """Add the gradient of the mean loss; returns it, its parts and the share of matches, weighted by slot."""
        anchors = [pick_anchors(example.dialogue, self._settings.anchors, random) for example in examples]
        step = pack(examples, anchors, self._index, self._slot_weights, self._columns)
        weight = float(step.targets.weights.sum())
        with self._autocast():
            blocks = self.drafter.hidden_blocks(step.features.float(), step.anchors, step.tokens, step.lengths)
        # Head by head and a few blocks at a time, backwards at once: the logits of all blocks are never there together.
        leaves = [part.detach().requires_grad_() for part in torch.split(blocks.hidden, _BLOCKS_AT_ONCE)]
        sums = np.zeros(5)
        for index, hidden in enumerate(leaves):
            part = slice(index * _BLOCKS_AT_ONCE, (index + 1) * _BLOCKS_AT_ONCE)
            with self._autocast():
                output = self.drafter.score(hidden, blocks.previous[part])
            losses = block_losses(output.draft_logits, output.confidence_logits, step.targets.part(part), self._losses)
            (losses.total / weight).backward()  # type: ignore[no-untyped-call]
            parts = (losses.total.detach(), losses.ce, losses.l1, losses.confidence, losses.matched)
            sums += [float(each) for each in parts]
        gradients = [hidden.grad for hidden in leaves if hidden.grad is not None]
        blocks.hidden.backward(torch.cat(gradients))  # type: ignore[no-untyped-call]
        return tuple((sums / weight).tolist())

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision == "float32":
            return nullcontext()
        # Norm weights stay float32; torch says so at every kind of norm.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        return torch.autocast("cpu", torch.bfloat16)
