"""The reference drafter as a torch module, for training and to compare exported graphs with (DESIGN, "in formulas").

Parameters carry the names of the released layout. Embedding and LM head belong to the target: they are passed in, stay
frozen, and are no part of ``state_dict``.

T context rows, F features a row, A anchors (blocks), g block size, H hidden size, V vocabulary of the target, Vd of the
drafter, r Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dspark_export.drafter_spec import DrafterSpec, describe_drafter
from dspark_export.errors import ExportError
from dspark_export.torch_heads import ConfidenceHead, MarkovHead
from dspark_export.torch_layer import ContextKeys, DrafterLayer, Rotation
from dspark_export.weights.safetensors_folder import SafetensorsFolder

CERTAIN = 30.0
"""Confidence logit of a drafter that has no confidence head."""


@dataclass(frozen=True)
class BlockOutput:
    """What the drafter says about A blocks."""

    hidden: Tensor
    """[A, g, H], after the final norm."""
    base_logits: Tensor
    """[A, g, Vd]: U."""
    draft_logits: Tensor
    """[A, g, Vd]: U + B, of which slot k is conditioned on ``previous[:, k]``."""
    confidence_logits: Tensor
    """[A, g]"""
    previous: Tensor
    """int64 [A, g]: target ids of the tokens before each slot: teacher-forced, or the anchor and what was drafted."""
    tokens: Tensor
    """int64 [A, g]: target ids of the most probable token of each slot."""


class TorchDrafter(nn.Module):
    """A drafter of the reference architecture.

    ``embedding`` and ``lm_head`` are the target's, [V, H] each. Raises ValueError where their shapes are others.
    """

    embedding: Tensor
    lm_head: Tensor
    d2t: Tensor | None

    def __init__(self, spec: DrafterSpec, embedding: Tensor, lm_head: Tensor) -> None:
        super().__init__()
        decoder = spec.decoder
        for name, shared in (("embedding", embedding), ("lm_head", lm_head)):
            if tuple(shared.shape) != (decoder.vocab_size, decoder.hidden_size):
                raise ValueError(
                    f"{name}: expected the target's of shape {(decoder.vocab_size, decoder.hidden_size)}, "
                    f"got {tuple(shared.shape)}"
                )
        self.spec = spec
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)
        reduced = spec.draft_vocab_size != decoder.vocab_size
        self.register_buffer("d2t", torch.arange(spec.draft_vocab_size) if reduced else None)
        self.fc = nn.Linear(spec.feature_size, decoder.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
        self.layers = nn.ModuleList(DrafterLayer(decoder) for _ in range(decoder.num_layers))
        self.norm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
        self.markov_head = MarkovHead(spec)
        self.confidence_head = ConfidenceHead(spec) if spec.confidence else None
        self._inverse_frequencies = torch.from_numpy(decoder.attention.rope.inverse_frequencies())

    def forward(self, features: Tensor, positions: Tensor, anchor: int, start: int) -> BlockOutput:
        """One round of one request, greedy: A = 1.

        ``features`` [T, F] are the committed context rows at ``positions`` int64 [T], all before ``start``, the
        anchor's position.
        """
        device = features.device
        anchors = torch.tensor([anchor], device=device)
        starts = torch.tensor([start], device=device)
        visible = torch.ones((1, len(features)), dtype=torch.bool, device=device)
        hidden = self._backbone(features, positions, anchors, starts, visible)
        return self._draft(hidden, anchors)

    def forward_blocks(
        self, features: Tensor, anchor_positions: Tensor, token_ids: Tensor, sequence_ids: Tensor | None = None
    ) -> BlockOutput:
        """Many blocks along a text in one pass, previous tokens teacher-forced.

        Row t of ``features`` [T, F] belongs to ``token_ids`` int64 [T]. The block of ``anchor_positions[a]`` (int64
        [A]: an index into the text) sees the rows before it and itself. Slot k predicts the token k + 1 places after
        the anchor. Slots whose previous token would lie behind the end are conditioned on the last token: leave them
        out of the loss.

        Several texts may be packed one after another: ``sequence_ids`` int64 [T] then tells which one a row is of;
        positions count from each one's start, and nothing looks across.
        """
        rows = torch.arange(len(features), device=features.device)
        visible = rows < anchor_positions[:, None]
        positions, last = rows, torch.full_like(anchor_positions, len(token_ids) - 1)
        if sequence_ids is not None:
            visible &= sequence_ids == sequence_ids[anchor_positions][:, None]
            same = sequence_ids[:, None] == sequence_ids
            positions = rows - same.int().argmax(dim=1)
            last = (same * rows).amax(dim=1)[anchor_positions]
        anchors, starts = token_ids[anchor_positions], positions[anchor_positions]
        hidden = self._backbone(features, positions, anchors, starts, visible)
        steps = torch.arange(self.spec.block_size, device=features.device)
        places = torch.minimum(anchor_positions[:, None] + steps, last[:, None])
        return self._score(hidden, token_ids[places])

    def _backbone(
        self, features: Tensor, positions: Tensor, anchors: Tensor, starts: Tensor, visible: Tensor
    ) -> Tensor:  # fmt: skip
        """Final-normed hidden states [A, g, H]. ``visible`` bool [A, T]: context rows that a block may look at."""
        spec = self.spec
        steps = torch.arange(spec.block_size, device=features.device)
        tokens = torch.where(steps == 0, anchors[:, None], spec.mask_token_id)
        x = self.embedding[tokens]
        context = self.hidden_norm(self.fc(features))
        keys = ContextKeys(context, Rotation.at(positions, self._inverse_frequencies, x.dtype), visible)
        rotation = Rotation.at(starts[:, None] + steps, self._inverse_frequencies, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, keys)
        normed: Tensor = self.norm(x)
        return normed

    def _base_logits(self, hidden: Tensor) -> Tensor:
        head = self.lm_head if self.d2t is None else self.lm_head[self.d2t]
        return nn.functional.linear(hidden, head)

    def _target_ids(self, drafted: Tensor) -> Tensor:
        return drafted if self.d2t is None else self.d2t[drafted]

    def _confidence(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        if self.confidence_head is None:
            return torch.full(hidden.shape[:-1], CERTAIN, device=hidden.device)
        logits: Tensor = self.confidence_head(hidden, embedded)
        return logits

    def _score(self, hidden: Tensor, previous: Tensor) -> BlockOutput:
        """All slots, given the tokens before them."""
        base = self._base_logits(hidden)
        embedded = self.markov_head.markov_w1(previous)
        logits = base + self.markov_head(hidden, embedded)
        confidence = self._confidence(hidden, embedded)
        return BlockOutput(hidden, base, logits, confidence, previous, self._target_ids(logits.argmax(dim=-1)))

    def _draft(self, hidden: Tensor, anchors: Tensor) -> BlockOutput:
        """Slot by slot, each conditioned on the most probable token of the one before."""
        previous = anchors[:, None]
        for _ in range(self.spec.block_size - 1):
            # Again from the start: slots are few, and one way of computing them is one way to be wrong.
            known = self._score(hidden[:, : previous.shape[1]], previous)
            previous = torch.cat([anchors[:, None], known.tokens], dim=1)
        return self._score(hidden, previous)


def load_torch_drafter(checkpoint: Path, embedding: Tensor, lm_head: Tensor) -> TorchDrafter:
    """The drafter of a checkpoint in the released layout, in float32.

    Raises:
        ExportError: it is incomplete, of a kind we cannot build, or a tensor has another shape.
    """
    weights = SafetensorsFolder(checkpoint)
    module = TorchDrafter(describe_drafter(weights.config), embedding, lm_head)
    state = {}
    for name, parameter in module.state_dict().items():
        stored = weights.read(name)
        if stored.shape != tuple(parameter.shape):
            raise ExportError(
                f"drafter {checkpoint.name}: expected {name} of shape {tuple(parameter.shape)}, got {stored.shape}"
            )
        kind = np.int64 if name == "d2t" else np.float32
        state[name] = torch.from_numpy(np.ascontiguousarray(stored, dtype=kind))
    module.load_state_dict(state)
    return module
