"""Which points of the cost model are measured: all combinations that memory and context allow, or fewer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from dspark_backend.kv_cache import capacity_for
from dspark_backend.stages.artifact import DrafterArtifact, VerifierArtifact

Item = TypeVar("Item")

_DEEP = 4
"""Tokens a request at the last measured point where there is no drafter."""


@dataclass(frozen=True)
class ProfilePlan:
    """What to measure, and how much time and memory that may take. Raises ValueError for a value below 1."""

    max_slots: int = 16
    """Most requests in a step."""
    capacities: tuple[int, ...] = (128, 512, 2048)
    """Rows of a slot to measure at; the model's context limits them."""
    memory_bytes: int = 2**30
    """For the caches of both stages; points that need more are left out."""
    max_seconds: float = 20.0
    """After this nothing is repeated. A slow model is measured at fewer points, but at each of them at least once."""
    repetitions: int = 9
    """Most measurements of a point."""

    def __post_init__(self) -> None:
        for name in ("max_slots", "memory_bytes", "max_seconds", "repetitions"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.capacities or min(self.capacities) < 1:
            raise ValueError(f"capacities: expected counts of at least 1, got {self.capacities}")


@dataclass(frozen=True)
class Level:
    """One capacity, and the numbers of requests measured there, ascending from 1."""

    capacity: int
    requests: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Points to measure: every (R, C) of the levels with every q; with a drafter also one draft, and one step in which
    the first request alone has the most tokens."""

    levels: tuple[Level, ...]
    tokens_each: tuple[int, ...]
    """q, ascending from 1."""
    widths: tuple[int, ...] = ()
    """Slots of a drafting round, ascending; empty without a drafter."""

    @classmethod
    def of(cls, plan: ProfilePlan, verifier: VerifierArtifact, drafter: DrafterArtifact | None) -> Grid:
        """The whole grid for these models."""
        row_bytes = verifier.cache_bytes_per_token + (drafter.cache_bytes_per_token if drafter else 0)
        context = verifier.max_context
        levels: list[Level] = []
        for capacity in sorted({min(wanted, capacity_for(context)) for wanted in plan.capacities}):
            # A slot more than are used: profiling copies from it.
            most = min(plan.max_slots, plan.memory_bytes // (row_bytes * capacity) - 1)
            if most >= 1:
                levels.append(Level(capacity, _powers_of_two(most)))
        if not levels:
            levels.append(Level(min(*plan.capacities, capacity_for(context)), (1,)))
        depths = {1, 2, 3, 5, drafter.block_size + 1} if drafter else {1, 2, _DEEP}
        room = min(context, levels[0].capacity)
        widths = {drafter.block_size, 1 if drafter.variable_width else drafter.block_size} if drafter else set()
        return cls(tuple(levels), tuple(sorted(depth for depth in depths if depth <= room)), tuple(sorted(widths)))

    def coarser(self) -> Iterator[Grid]:
        """Grids with fewer and fewer points, beginning with this one.

        Tokens a request go first, the second capacity and the numbers of requests between the ends last: a step's time
        is nearly a line in tokens, but none from 1 to 64 requests, and attention is free at the smallest capacity.
        """
        yield self
        grid = replace(self, levels=_ends(self.levels))
        yield grid
        grid = replace(grid, tokens_each=_thinned(grid.tokens_each))
        yield grid
        grid = grid._with_fewer_requests()
        yield grid
        grid = replace(grid, tokens_each=_ends(grid.tokens_each))
        yield grid
        grid = grid._with_fewer_requests()
        yield grid
        grid = replace(grid, levels=grid.levels[:1])
        yield grid
        yield replace(grid, levels=(replace(grid.levels[0], requests=_ends(grid.levels[0].requests)),))

    def _with_fewer_requests(self) -> Grid:
        return replace(
            self, levels=tuple(replace(level, requests=_thinned(level.requests)) for level in self.levels)
        )  # fmt: skip

    def estimate_seconds(self, lightest: float, heaviest: float, draft: float) -> float:
        """Roughly how long one measurement of every point takes, from the times of single steps.

        ``lightest`` is that of one token, ``heaviest`` of the most requests with the most tokens each, ``draft`` of a
        drafting round of the most requests and slots, all at the smallest capacity. Larger ones are taken to cost half
        as much again.
        """
        most = max(level.requests[-1] for level in self.levels) * self.tokens_each[-1] - 1
        total = 0.0
        for index, level in enumerate(self.levels):
            for requests in level.requests:
                shares = [(requests * each - 1) / max(most, 1) for each in self.tokens_each]
                if draft and requests > 1:  # the uneven step
                    shares.append((requests - 2 + self.tokens_each[-1]) / max(most, 1))
                step = sum(lightest + max(heaviest - lightest, 0.0) * share for share in shares)
                total += (step + draft * len(self.widths)) * (1.0 if index == 0 else 1.5)
        return total


def _powers_of_two(most: int) -> tuple[int, ...]:
    powers = {1 << bit for bit in range(most.bit_length())}
    return tuple(sorted(powers | {most}))


def _ends(values: tuple[Item, ...]) -> tuple[Item, ...]:
    return values if len(values) <= 2 else (values[0], values[-1])


def _thinned(values: tuple[int, ...]) -> tuple[int, ...]:
    """Every other value counted from the last, and the first."""
    return tuple(sorted({values[0], *values[::-2]}))
