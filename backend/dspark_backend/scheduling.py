"""Verification depth policies: how many drafts of each request go into the next step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_backend.cost import CostTable


@dataclass(frozen=True)
class DraftRound:
    """What a policy may look at. Nothing here depends on the values of the drafted tokens but through ``survival``."""

    survival: NDArray[np.float64]
    """[R, gamma]: calibrated probability that drafts 1 .. k are all accepted."""
    limits: NDArray[np.int64]
    """[R]: most drafts worth verifying for each request (its own cap, the tokens it may still emit)."""
    cost: CostTable | None
    """None where no curve was measured: policies that need one refuse at load."""


class DepthPolicy(Protocol):
    """Chooses depths, one a request, between 0 and its limit."""

    drafts: bool
    """False: the drafter never runs."""

    def depths(self, draft_round: DraftRound) -> NDArray[np.int64]:
        """Drafts to verify for each request, int64 [R]."""


class Off:
    """No speculation: every step verifies the anchors alone."""

    drafts = False

    def depths(self, draft_round: DraftRound) -> NDArray[np.int64]:
        return np.zeros(len(draft_round.limits), dtype=np.int64)


POLICIES: Mapping[str, type[DepthPolicy]] = {"off": Off}
