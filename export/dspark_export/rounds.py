"""Observed rounds of speculation as arrays: what calibration and evaluation compute from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_backend.telemetry import RoundRecord
from dspark_export.errors import ExportError


@dataclass(frozen=True)
class RoundTable:
    """N rounds of a drafter with block size g."""

    confidence_logits: NDArray[np.float32]
    """[N, g]"""
    sampled: NDArray[np.bool_]
    """[N]"""
    verified: NDArray[np.int64]
    """[N]"""
    accepted: NDArray[np.int64]
    """[N]"""
    request: NDArray[np.int64]
    """[N]"""

    @classmethod
    def of(cls, records: Sequence[RoundRecord]) -> RoundTable:
        """Raises ExportError where there are none, they are of different block sizes, or counts cannot be."""
        if not records:
            raise ExportError(
                "expected at least one observed round, got none; give more prompts, or longer answers, and a policy "
                "that drafts"
            )
        sizes = {len(record.confidence_logits) for record in records}
        if len(sizes) > 1:
            raise ExportError(f"expected rounds of one drafter, got block sizes {', '.join(map(str, sorted(sizes)))}")
        table = cls(
            confidence_logits=np.stack([record.confidence_logits for record in records]).astype(np.float32, copy=False),
            sampled=np.array([record.sampled for record in records], dtype=np.bool_),
            verified=np.array([record.verified for record in records], dtype=np.int64),
            accepted=np.array([record.accepted for record in records], dtype=np.int64),
            request=np.array([record.request for record in records], dtype=np.int64),
        )
        if ((table.accepted < 0) | (table.accepted > table.verified) | (table.verified > table.block_size)).any():
            raise ExportError(f"expected 0 <= accepted <= verified <= {table.block_size} in every round")
        return table

    def __len__(self) -> int:
        return len(self.verified)

    @property
    def block_size(self) -> int:
        return int(self.confidence_logits.shape[1])

    @property
    def num_requests(self) -> int:
        return len(np.unique(self.request))

    @property
    def accepted_length(self) -> float:
        """Mean tokens a round yields: accepted drafts and the bonus token. nan without rounds."""
        return float(self.accepted.mean()) + 1.0 if len(self) else float("nan")

    def where(self, keep: NDArray[np.bool_]) -> RoundTable:
        """The rounds of a mask [N]."""
        return RoundTable(
            self.confidence_logits[keep],
            self.sampled[keep],
            self.verified[keep],
            self.accepted[keep],
            self.request[keep],
        )

    def regime(self, sampled: bool) -> RoundTable:
        """The rounds of one sampling regime."""
        return self.where(self.sampled == sampled)
