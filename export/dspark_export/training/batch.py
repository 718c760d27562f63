"""What a training step runs on: dialogues packed one after another, anchors in them, and the target's word on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_export.torch_drafter import TorchDrafter
from dspark_export.training.losses import OUTSIDE, BlockTargets
from dspark_export.training.record import TargetRecord
from dspark_export.training.shard import Dialogue


@dataclass(frozen=True)
class Example:
    """A dialogue and what the target says along it."""

    dialogue: Dialogue
    record: TargetRecord


@dataclass(frozen=True)
class PackedStep:
    """Texts of altogether T tokens and A anchors in them."""

    features: Tensor
    """bfloat16 [T, F]: the last token of each text has a row of zeros that nothing looks at."""
    tokens: Tensor
    """int64 [T]"""
    lengths: list[int]
    """Of the texts."""
    anchors: Tensor
    """int64 [A]: indices into the T tokens, text by text."""
    targets: BlockTargets


def draft_index(drafter: TorchDrafter) -> Tensor:
    """int64 [V]: a target token's index in the draft vocabulary, or OUTSIDE."""
    size = drafter.spec.decoder.vocab_size
    if drafter.d2t is None:
        return torch.arange(size)
    index = torch.full((size,), OUTSIDE, dtype=torch.int64)
    index[drafter.d2t] = torch.arange(len(drafter.d2t))
    return index


def pick_anchors(dialogue: Dialogue, most: int, random: np.random.Generator) -> Tensor:
    """Ascending positions of the answer that have a token behind them, at most ``most``, int64."""
    chosen = random.choice(dialogue.num_anchors, min(most, dialogue.num_anchors), replace=False)
    return torch.from_numpy(np.sort(chosen) + dialogue.prompt_length)


def block_targets(example: Example, anchors: Tensor, index: Tensor, slot_weights: Tensor) -> BlockTargets:
    """What the target says about the blocks of ``anchors`` int64 [A]; ``index`` is that of :func:`draft_index`."""
    dialogue, record = example.dialogue, example.record
    places = anchors[:, None] + torch.arange(len(slot_weights))
    last = len(dialogue.tokens) - 1
    weights = (places < last) * slot_weights
    places = places.clamp(max=last - 1)
    tokens = torch.from_numpy(dialogue.tokens.astype(np.int64))
    # Row i of a record is about the i-th token of the answer; a slot predicts the token behind its place.
    rows = places + 1 - dialogue.prompt_length
    ids = index[record.top_ids.long()][rows]
    probabilities = record.top_probabilities.float()[rows] * (ids != OUTSIDE)
    return BlockTargets(ids.clamp(min=0), probabilities, index[tokens[places + 1]], weights)


def pack(
    examples: Sequence[Example], anchors: Sequence[Tensor], index: Tensor, slot_weights: Tensor, columns: Tensor | None
) -> PackedStep:
    """Lay dialogues out one after another. ``anchors`` are positions in each; ``columns`` int64: features to keep."""
    features, tokens, places, targets, start = [], [], [], [], 0
    lengths = [len(example.dialogue.tokens) for example in examples]
    for example, mine, length in zip(examples, anchors, lengths, strict=True):
        rows = example.record.features if columns is None else example.record.features[:, columns]
        features += [rows, rows.new_zeros((1, rows.shape[1]))]
        tokens.append(torch.from_numpy(example.dialogue.tokens.astype(np.int64)))
        places.append(mine + start)
        targets.append(block_targets(example, mine, index, slot_weights))
        start += length
    return PackedStep(
        torch.cat(features),
        torch.cat(tokens),
        lengths,
        torch.cat(places),
        BlockTargets(
            torch.cat([each.ids for each in targets]),
            torch.cat([each.probabilities for each in targets]),
            torch.cat([each.labels for each in targets]),
            torch.cat([each.weights for each in targets]),
        ),
    )
