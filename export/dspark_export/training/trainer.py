"""One training step: a few dialogues, random anchors in each, teacher-forced blocks, and an optimiser."""

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
from dspark_export.training.features import TargetPass
from dspark_export.training.losses import OUTSIDE, BlockTargets, LossWeights, block_losses, position_weights
from dspark_export.training.schedule import average_decay, update_average
from dspark_export.training.settings import TrainSettings
from dspark_export.training.shard import Dialogue

_NORM_RATE = 10.0


@dataclass(frozen=True)
class StepReport:
    """Means over the slots of a step."""

    loss: float
    ce: float
    l1: float
    confidence: float
    gradient_norm: float
    """Before clipping."""


@dataclass(frozen=True)
class _Sample:
    """A dialogue with what the target says along it."""

    features: Tensor
    tokens: Tensor
    anchors: Tensor
    targets: BlockTargets


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
        target: TargetPass,
        settings: TrainSettings,
        precision: str,
    ) -> None:
        self.drafter = drafter
        self.average = average
        self._target = target
        self._settings = settings
        self._precision = precision
        self._losses = LossWeights(settings.ce_weight, settings.l1_weight, settings.confidence_weight)
        self._slot_weights = position_weights(settings.block_size, settings.position_decay)
        self._draft_index = _draft_index(drafter)
        self.optimiser = torch.optim.AdamW(_groups(drafter, settings.weight_decay), betas=(0.9, 0.95), eps=1e-8)

    def step(self, dialogues: Sequence[Dialogue], random: np.random.Generator, rate: float, number: int) -> StepReport:
        """Train on random anchors of each dialogue. ``number`` counts steps from 0."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["rate_scale"]
        self.optimiser.zero_grad(set_to_none=True)
        anchors = [self._anchors(dialogue, random) for dialogue in dialogues]
        weight = sum(float(self._weights(*pair).sum()) for pair in zip(dialogues, anchors, strict=True))
        sums = np.zeros(4)
        for dialogue, places in zip(dialogues, anchors, strict=True):
            sample = self._sample(dialogue, places)
            with self._autocast():
                output = self.drafter.forward_blocks(sample.features, sample.anchors, sample.tokens)
            losses = block_losses(output.draft_logits, output.confidence_logits, sample.targets, self._losses)
            (losses.total / weight).backward()  # type: ignore[no-untyped-call]
            sums += [float(part) for part in (losses.total.detach(), losses.ce, losses.l1, losses.confidence)]
        norm = float(nn.utils.clip_grad_norm_(self.drafter.parameters(), self._settings.clip))
        if not np.isfinite(norm):
            raise FloatingPointError(f"step {number}: the gradient is not finite; train with a lower --learning-rate")
        self.optimiser.step()
        update_average(self.average.state_dict(), self.drafter.state_dict(), average_decay(self._settings.ema, number))
        loss, ce, l1, confidence = (sums / weight).tolist()
        return StepReport(loss, ce, l1, confidence, norm)

    def _anchors(self, dialogue: Dialogue, random: np.random.Generator) -> Tensor:
        """Ascending positions of the answer that have a token behind them."""
        count = min(self._settings.anchors, dialogue.num_anchors)
        chosen = random.choice(dialogue.num_anchors, count, replace=False)
        return torch.from_numpy(np.sort(chosen) + dialogue.prompt_length)

    def _places(self, anchors: Tensor) -> Tensor:
        """Position that each slot's target distribution stands at, int64 [A, g]."""
        return anchors[:, None] + torch.arange(self._settings.block_size)

    def _weights(self, dialogue: Dialogue, anchors: Tensor) -> Tensor:
        """[A, g]: 0 where there is no token to predict any more."""
        return (self._places(anchors) < len(dialogue.tokens) - 1) * self._slot_weights

    def _sample(self, dialogue: Dialogue, anchors: Tensor) -> _Sample:
        weights, last = self._weights(dialogue, anchors), len(dialogue.tokens) - 1
        places = self._places(anchors).clamp(max=last - 1)
        wanted = np.zeros(len(dialogue.tokens), dtype=bool)
        wanted[places.numpy()] = True
        row_of = torch.from_numpy(np.cumsum(wanted) - 1)
        features, rows = self._target.rows(dialogue.tokens, wanted)
        tokens = torch.from_numpy(dialogue.tokens.astype(np.int64))
        index = row_of[places]
        labels = self._draft_index[tokens[places + 1]]
        targets = BlockTargets(rows.probabilities[index], rows.outside[index], labels, weights)
        return _Sample(torch.from_numpy(features), tokens, anchors, targets)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision == "float32":
            return nullcontext()
        # Norm weights stay float32; torch says so at every kind of norm.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        return torch.autocast("cpu", torch.bfloat16)


def _draft_index(drafter: TorchDrafter) -> Tensor:
    """int64 [V]: a target token's index in the draft vocabulary, or OUTSIDE."""
    size = drafter.spec.decoder.vocab_size
    if drafter.d2t is None:
        return torch.arange(size)
    index = torch.full((size,), OUTSIDE, dtype=torch.int64)
    index[drafter.d2t] = torch.arange(len(drafter.d2t))
    return index


def _groups(drafter: TorchDrafter, decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms, biases and the Markov tables do not: rare tokens would be forgotten between two visits."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        if name == "norm.weight":
            continue
        whole = parameter.ndim < 2 or name.startswith("markov_head.markov_w")
        (kept if whole else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": decay, "rate_scale": 1.0},
        {"params": kept, "weight_decay": 0.0, "rate_scale": 1.0},
        # It sets how sure the backbone can be, and starts low.
        {"params": [drafter.norm.weight], "weight_decay": 0.0, "rate_scale": _NORM_RATE},
    ]
