"""The torch drafter's sequential head and confidence head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_export.drafter_spec import DrafterSpec


class MarkovHead(nn.Module):
    """The bias B_k that the token before slot k puts on its base logits: vanilla, gated or rnn (DESIGN)."""

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        hidden, rank = spec.decoder.hidden_size, spec.markov_rank
        self._kind = spec.head
        self.markov_w1 = nn.Embedding(spec.decoder.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, spec.draft_vocab_size, bias=False)
        if spec.head == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        if spec.head == "rnn":
            self.joint_proj = nn.Linear(hidden + 2 * rank, 3 * rank)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """B [A, g, Vd] of ``hidden`` [A, g, H] and ``embedded`` = W1[previous token] [A, g, r]."""
        if self._kind == "gated":
            gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1)))
            embedded = gate * embedded
        if self._kind == "rnn":
            embedded = self._run(hidden, embedded)
        bias: Tensor = self.markov_w2(embedded)
        return bias

    def _run(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """tanh(o) of every slot, [A, g, r]; the state starts at 0."""
        state = torch.zeros_like(embedded[:, 0])
        outputs = []
        for slot in range(hidden.shape[1]):
            joint = self.joint_proj(torch.cat([state, embedded[:, slot], hidden[:, slot]], dim=-1))
            gate, candidate, output = joint.chunk(3, dim=-1)
            keep = torch.sigmoid(gate)
            state = keep * state + (1 - keep) * torch.tanh(candidate)
            outputs.append(torch.tanh(output))
        return torch.stack(outputs, dim=1)


class ConfidenceHead(nn.Module):
    """The logit of c_k = sigmoid(w . [h_k; W1[x_{k-1}]] + b): whether draft k is accepted given that those before are.

    It sees neither x_k nor, where the spec says so, the token before it.
    """

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self._with_markov = spec.confidence_with_markov
        self.proj = nn.Linear(spec.decoder.hidden_size + (spec.markov_rank if self._with_markov else 0), 1)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """[A, g] of ``hidden`` [A, g, H] and ``embedded`` [A, g, r]."""
        seen = torch.cat([hidden, embedded], dim=-1) if self._with_markov else hidden
        logits: Tensor = self.proj(seen).squeeze(-1)
        return logits
