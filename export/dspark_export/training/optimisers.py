"""AdamW for all parameters, or Muon for the matrices of the backbone and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dspark_export.torch_drafter import TorchDrafter
from dspark_export.training.settings import TrainSettings

_NORM_RATE = 10.0
_BETAS = (0.9, 0.95)


class Optimisers:
    """One or two optimisers that step together."""

    def __init__(self, drafter: TorchDrafter, settings: TrainSettings) -> None:
        matrices, tables, rest = _split(drafter)
        # Matrices decay; norms, biases and the Markov tables do not: rare tokens would be forgotten between two visits.
        groups: list[dict[str, Any]] = [
            {"params": tables + rest, "weight_decay": 0.0, "rate_scale": 1.0},
            # It sets how sure the backbone can be, and starts low.
            {"params": [drafter.norm.weight], "weight_decay": 0.0, "rate_scale": _NORM_RATE},
        ]
        self._all: list[torch.optim.Optimizer] = []
        if settings.optimiser == "muon":
            self._all.append(
                torch.optim.Muon(
                    [{"params": matrices, "rate_scale": settings.muon_rate}],
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                    ns_steps=settings.muon_iterations,
                )
            )
        else:
            groups.insert(0, {"params": matrices, "weight_decay": settings.weight_decay, "rate_scale": 1.0})
        self._all.append(torch.optim.AdamW(groups, betas=_BETAS, eps=1e-8, fused=True))

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next step."""
        for optimiser in self._all:
            for group in optimiser.param_groups:
                group["lr"] = rate * group["rate_scale"]

    def zero_grad(self) -> None:
        for optimiser in self._all:
            optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimiser in self._all:
            optimiser.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {str(index): optimiser.state_dict() for index, optimiser in enumerate(self._all)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of ``state_dict``."""
        for index, optimiser in enumerate(self._all):
            optimiser.load_state_dict(state[str(index)])


def _split(drafter: TorchDrafter) -> tuple[Sequence[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of the backbone, tables of the Markov head, and all else but the final norm."""
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        if name == "norm.weight":
            continue
        if parameter.ndim < 2 or name.startswith("confidence_head"):
            rest.append(parameter)
        elif name.startswith("markov_head.markov_w"):
            tables.append(parameter)
        else:
            matrices.append(parameter)
    return matrices, tables, rest
