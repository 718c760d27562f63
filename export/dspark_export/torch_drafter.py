"""The reference drafter as a torch module, for training and to compare exported graphs with (DESIGN, "in formulas").

Parameters carry the names of the released layout. Embedding and LM head belong to the target: they are passed in, stay
frozen, and are no part of ``state_dict``.

T context rows, F features a row, A anchors (blocks), g block size, H hidden size, V vocabulary of the target, Vd of the
drafter, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dspark_export.drafter_spec import DrafterSpec, describe_drafter
from dspark_export.errors import ExportError
from dspark_export.torch_heads import ConfidenceHead, MarkovHead
from dspark_export.torch_layer import ContextKeys, DrafterLayer, Rotation, TextBlocks
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
    d2t: Tensor | None
    """int64 [Vd]: target ids of the draft vocabulary; None where it is the target's."""

    @property
    def tokens(self) -> Tensor:
        """int64 [A, g]: target ids of the most probable token of each slot."""
        drafted = self.draft_logits.argmax(dim=-1)
        return drafted if self.d2t is None else self.d2t[drafted]


@dataclass(frozen=True)
class BlockHidden:
    """Blocks between the backbone and the heads."""

    hidden: Tensor
    """[A, g, H], after the final norm."""
    previous: Tensor
    """int64 [A, g]: teacher-forced tokens before each slot."""


class TorchDrafter(nn.Module):
    """A drafter of the reference architecture.

    ``embedding`` and ``lm_head`` are the target's, [V, H] each. Raises ValueError where their shapes are others.
    """

    embedding: Tensor
    lm_head: Tensor
    feature_scale: Tensor
    """[F]: what ``fc`` was trained behind; ones for a checkpoint in the released layout, whose ``fc`` contains it."""
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
        self.register_buffer("feature_scale", torch.ones(spec.feature_size), persistent=False)
        reduced = spec.draft_vocab_size != decoder.vocab_size
        self.register_buffer("d2t", torch.arange(spec.draft_vocab_size) if reduced else None)
        self.fc = nn.Linear(spec.feature_size, decoder.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
        self.layers = nn.ModuleList(
            DrafterLayer(decoder, attention, spec.causal_windows and attention.window is not None)
            for attention in decoder.layer_attentions
        )
        self.norm = nn.RMSNorm(decoder.hidden_size, decoder.norm_eps)
        self.markov_head = MarkovHead(spec)
        self.confidence_head = ConfidenceHead(spec) if spec.confidence else None
        self._kept_head: tuple[object, Tensor] | None = None
        self._inverse_frequencies = torch.from_numpy(decoder.attention.rope.inverse_frequencies())
        self._amplitude = decoder.attention.rope.scaling.amplitude

    def forward(self, features: Tensor, positions: Tensor, anchor: int, start: int) -> BlockOutput:
        """One round of one request, greedy: A = 1.

        ``features`` [T, F] are the committed context rows at ``positions`` int64 [T], all before ``start``, the
        anchor's position.
        """
        device = features.device
        anchors = torch.tensor([anchor], device=device)
        starts = torch.tensor([start], device=device)
        visible = torch.ones((1, len(features)), dtype=torch.bool, device=device)
        hidden = self._backbone(features, positions, anchors, starts, [TextBlocks(slice(1), slice(None), visible)])
        return self._draft(hidden, anchors)

    def forward_blocks(
        self,
        features: Tensor,
        anchor_positions: Tensor,
        token_ids: Tensor,
        lengths: Sequence[int] | None = None,
    ) -> BlockOutput:
        """Many blocks along a text in one pass, previous tokens teacher-forced.

        Row t of ``features`` [T, F] belongs to ``token_ids`` int64 [T]. The block of ``anchor_positions[a]`` (int64
        [A]: an index into the text) sees the rows before it and itself. Slot k predicts the token k + 1 places after
        the anchor. Slots whose previous token would lie behind the end are conditioned on the last token: leave them
        out of the loss.

        Several texts may be packed one after another: ``lengths`` are theirs, and anchors come text by text. Positions
        count from each one's start, and nothing looks across.
        """
        found = self.hidden_blocks(features, anchor_positions, token_ids, lengths)
        return self.score(found.hidden, found.previous)

    def hidden_blocks(
        self,
        features: Tensor,
        anchor_positions: Tensor,
        token_ids: Tensor,
        lengths: Sequence[int] | None = None,
    ) -> BlockHidden:
        """``forward_blocks`` without the heads."""
        lengths = lengths if lengths is not None else [len(token_ids)]
        ends = torch.tensor(lengths).cumsum(0)
        text_of = torch.searchsorted(ends, anchor_positions, right=True)
        starts = ends - torch.tensor(lengths)
        positions = torch.cat([torch.arange(length) for length in lengths])
        counts = torch.bincount(text_of, minlength=len(lengths)).tolist()
        texts, block = [], 0
        for start, count in zip(starts.tolist(), counts, strict=True):
            if not count:
                continue
            mine = anchor_positions[block : block + count]
            end = int(mine.max())
            visible = torch.arange(start, end) < mine[:, None]
            texts.append(TextBlocks(slice(block, block + count), slice(start, end), visible))
            block += count
        anchors = token_ids[anchor_positions]
        hidden = self._backbone(features, positions[: len(features)], anchors, positions[anchor_positions], texts)
        steps = torch.arange(self.spec.block_size)
        places = torch.minimum(anchor_positions[:, None] + steps, (ends - 1)[text_of][:, None])
        return BlockHidden(hidden, token_ids[places])

    def _backbone(
        self, features: Tensor, positions: Tensor, anchors: Tensor, starts: Tensor, texts: Sequence[TextBlocks]
    ) -> Tensor:  # fmt: skip
        """Final-normed hidden states [A, g, H]."""
        spec = self.spec
        steps = torch.arange(spec.block_size, device=features.device)
        tokens = torch.where(steps == 0, anchors[:, None], spec.mask_token_id)
        x = self.embedding[tokens]
        if spec.decoder.embedding_scale != 1.0:
            x = x * spec.decoder.embedding_scale
        context = self.hidden_norm(self.fc(features * self.feature_scale))
        turn = Rotation.at(positions, self._inverse_frequencies, x.dtype, self._amplitude)
        keys = ContextKeys(context, turn, texts, positions, starts)
        rotation = Rotation.at(starts[:, None] + steps, self._inverse_frequencies, x.dtype, self._amplitude)
        for layer in self.layers:
            x = layer(x, rotation, keys)
        normed: Tensor = self.norm(x)
        return normed

    def _draft_head(self, dtype: torch.dtype) -> Tensor:
        """Rows of the LM head that are proposed, kept: picking and rounding them takes longer than a small product."""
        if self.d2t is None and dtype == self.lm_head.dtype:
            return self.lm_head
        key = (None if self.d2t is None else (self.d2t.data_ptr(), self.d2t._version), dtype, self.lm_head.data_ptr())
        if self._kept_head is None or self._kept_head[0] != key:
            head = self.lm_head if self.d2t is None else self.lm_head[self.d2t]
            self._kept_head = (key, head.to(dtype))
        return self._kept_head[1]

    def _base_logits(self, hidden: Tensor) -> Tensor:
        reduced = torch.is_autocast_enabled("cpu")
        head = self._draft_head(torch.get_autocast_dtype("cpu") if reduced else self.lm_head.dtype)
        logits, cap = nn.functional.linear(hidden, head), self.spec.decoder.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _confidence(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        if self.confidence_head is None:
            return torch.full(hidden.shape[:-1], CERTAIN, device=hidden.device)
        logits: Tensor = self.confidence_head(hidden, embedded)
        return logits

    def score(self, hidden: Tensor, previous: Tensor) -> BlockOutput:
        """All slots of ``hidden`` [A, g, H], given the tokens before them: ``previous`` int64 [A, g]."""
        base = self._base_logits(hidden)
        embedded = self.markov_head.markov_w1(previous)
        logits = base + self.markov_head(hidden, embedded)
        confidence = self._confidence(hidden, embedded)
        return BlockOutput(hidden, base, logits, confidence, previous, self.d2t)

    def _draft(self, hidden: Tensor, anchors: Tensor) -> BlockOutput:
        """Slot by slot, each conditioned on the most probable token of the one before."""
        previous = anchors[:, None]
        for _ in range(self.spec.block_size - 1):
            # Again from the start: slots are few, and one way of computing them is one way to be wrong.
            known = self.score(hidden[:, : previous.shape[1]], previous)
            previous = torch.cat([anchors[:, None], known.tokens], dim=1)
        return self.score(hidden, previous)


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
