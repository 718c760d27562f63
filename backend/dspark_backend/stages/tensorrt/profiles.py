"""Which optimization profile a step runs with, and how its sizes are rounded so that few different ones come up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspark_backend.errors import ArtifactError, InternalError
from dspark_backend.stages.engine_contract import Profile, Range
from dspark_backend.stages.engine_info import EngineInfo


@dataclass(frozen=True)
class Choice:
    """A profile and the sizes, by symbol, that a step runs with: at least what it needs."""

    index: int
    sizes: Mapping[str, int]


def rounded(size: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not less: at most half as much again."""
    power = 1 << max(size - 1, 0).bit_length()
    return power // 4 * 3 if power >= 4 and size <= power // 4 * 3 else power


def fit(size: int, allowed: Range) -> int | None:
    """``size`` rounded up within a range; None where it is beyond it."""
    if size > allowed.high:
        return None
    return max(allowed.low, min(rounded(size), allowed.high))


def most(profiles: Sequence[Profile], symbol: str) -> int:
    """The largest size that any of the profiles takes."""
    return max(profile.ranges[symbol].high for profile in profiles)


def choose(profiles: Sequence[Profile], needed: Mapping[str, int], limits: Mapping[str, int]) -> Choice:
    """The first profile that holds what a step needs. ``limits`` bounds rounding, where there is no more to view.

    Raises:
        InternalError: no profile holds it; the message says which sizes each lacks.
    """
    reasons = []
    for index, profile in enumerate(profiles):
        sizes: dict[str, int] = {}
        for symbol, size in needed.items():
            allowed = profile.ranges[symbol]
            fitted = fit(size, allowed)
            if fitted is not None:
                fitted = min(fitted, limits.get(symbol, fitted))
            if fitted is None or fitted < max(size, allowed.low):
                reasons.append(f"{profile.name} takes {symbol} from {allowed.low} to {allowed.high}")
                break
            sizes[symbol] = fitted
        else:
            return Choice(index, sizes)
    asked = ", ".join(f"{symbol}={size}" for symbol, size in needed.items())
    raise InternalError(
        f"engine: expected a profile for {asked}, there is none ({'; '.join(reasons)}); lower max_slots or "
        "prefill_chunk, or build the engine with larger --profiles"
    )


def engine_profiles(info: EngineInfo, engine: str, symbols: Sequence[str]) -> tuple[Profile, ...]:
    """The profiles of one engine, in the order of their indices.

    Raises:
        ArtifactError: there is none, or one misses a symbol or has an impossible range.
    """
    found = []
    for one in info.profiles:
        if one.engine != engine:
            continue
        try:
            ranges = {symbol: Range(*one.ranges[symbol]) for symbol in symbols}
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"{engine}: profile {one.name}: expected ranges of {', '.join(symbols)}, got {error}; build it again"
            ) from error
        found.append(Profile(one.name, ranges))
    if not found:
        raise ArtifactError(
            f"{engine}: expected optimization profiles in stage.json, found none; export the stage and build it "
            "again with this version"
        )
    return tuple(found)
