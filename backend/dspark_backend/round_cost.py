"""What a round will take: the cost model's curves, corrected by what steps really take."""

from __future__ import annotations

import logging

import numpy as np

from dspark_backend.cost import CostModel, FloatArray
from dspark_backend.cost_cache import CostCache
from dspark_backend.cost_tracker import CostTracker
from dspark_backend.surcharge import Surcharge

logger = logging.getLogger(__name__)


class RoundCost:
    """Predictions for rounds of up to ``block_size`` drafts a request, and the steps that they are held against.

    A cost model answers in tens of microseconds; the few combinations of requests and capacity that are in use at a
    time are asked for in every round, so that answers are kept.
    """

    _MOST_KEPT = 256
    _PLAIN_EVERY = 48
    """Steps after which one without drafts would tell what drafts cost."""

    def __init__(self, model: CostModel, block_size: int, cache: CostCache | None = None) -> None:
        """``cache``: where the model is kept; told to forget it when it proves wrong."""
        self._model = model
        self._block_size = block_size
        self._cache = cache
        self._verify = CostTracker()
        self._draft = CostTracker()
        self._surcharges: dict[int, Surcharge] = {}
        """By powers of two of the requests."""
        self._curves: dict[tuple[int, int, int], FloatArray] = {}
        self._draft_times: dict[tuple[int, int, int], float] = {}

    @property
    def mean_relative_error(self) -> float:
        """Running mean of abs(predicted - actual) / actual of verification steps."""
        return self._verify.mean_relative_error

    def verify_seconds(self, num_requests: int, drafts: int, capacity: int, depth: int) -> float:
        """Of a step of so many requests and so many drafts in all, ``depth`` at most of one, at the model's pace."""
        plain, curve = self._plain(num_requests, capacity), self._curve(num_requests, capacity, depth)
        return plain + self._surcharge(num_requests).scale * (float(curve[drafts]) - plain)

    def depth_costs(self, num_requests: int, capacity: int) -> bool:
        """Whether it takes time that drafts may be verified deep, even where few are: more than a thousandth of a step.

        A step may have places for as many tokens of every request as the widest has; a drafter takes its time for every
        slot of a block.
        """
        step = self._plain(num_requests, capacity)
        block, slot = (self._draft_seconds(num_requests, capacity, width) for width in (self._block_size, 1))
        return max(self._model.place_seconds(num_requests, capacity), block - slot) > 1e-3 * step

    def draft_seconds(self, num_requests: int, capacity: int, width: int) -> float:
        """Of a drafting round of ``width`` slots for each of so many requests."""
        return self._draft_seconds(num_requests, capacity, width) * self._draft.scale

    def step_seconds(self, num_requests: int, most: int, capacity: int, depth: int) -> FloatArray:
        """Of a verification step with k drafts: float64 [most + 1], by k.

        Whatever k is, the step has room for ``depth`` drafts of each request.
        """
        plain, curve = self._plain(num_requests, capacity), self._curve(num_requests, capacity, depth)[: most + 1]
        return (plain + self._surcharge(num_requests).scale * (curve - plain)) * self._verify.scale

    def wants_plain(self, num_requests: int) -> bool:
        """Whether it is long ago that a step of so many requests ran without drafts."""
        return self._surcharge(num_requests).since_plain >= self._PLAIN_EVERY

    def observe_verify(self, num_requests: int, drafts: int, capacity: int, depth: int, seconds: float) -> None:
        """A step, as for ``verify_seconds``, took so long."""
        self._verify.update(self.verify_seconds(num_requests, drafts, capacity, depth), seconds)
        if seconds > 0.0:
            plain, surcharge = self._plain(num_requests, capacity), self._surcharge(num_requests)
            if drafts:
                surcharge.drafted(plain, float(self._curve(num_requests, capacity, depth)[drafts]), seconds)
            else:
                surcharge.plain(plain, seconds)
        if self._cache is not None and self._verify.is_stale():
            logger.warning(
                "verification steps take %.1f times what was measured at an earlier load; the next load measures again",
                self._verify.scale,
            )
            self._cache.invalidate()
            self._cache = None

    def observe_draft(self, num_requests: int, capacity: int, width: int, seconds: float) -> None:
        """A drafting round of so many requests and slots took so long."""
        self._draft.update(self._draft_seconds(num_requests, capacity, width), seconds)

    def _surcharge(self, num_requests: int) -> Surcharge:
        return self._surcharges.setdefault(num_requests.bit_length(), Surcharge())

    def _plain(self, num_requests: int, capacity: int) -> float:
        return float(self._curve(num_requests, capacity, 0)[0])

    def _curve(self, num_requests: int, capacity: int, depth: int) -> FloatArray:
        """float64 [block_size * num_requests + 1], by drafts."""
        key = (num_requests, capacity, depth)
        curve = self._curves.get(key)
        if curve is None:
            counts = num_requests + np.arange(self._block_size * num_requests + 1)
            curve = self._model.verify_seconds(num_requests, counts, capacity, widest=depth + 1)
            # Where a place costs more than a token the line would fall, and drafts would be given away.
            curve = np.maximum.accumulate(curve)
            if len(self._curves) == self._MOST_KEPT:
                self._curves.clear()
            self._curves[key] = curve
        return curve

    def _draft_seconds(self, num_requests: int, capacity: int, width: int) -> float:
        key = (num_requests, capacity, width)
        seconds = self._draft_times.get(key)
        if seconds is None:
            if len(self._draft_times) == self._MOST_KEPT:
                self._draft_times.clear()
            seconds = self._draft_times[key] = self._model.draft_seconds(num_requests, capacity, width)
        return seconds
