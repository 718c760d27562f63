"""What built engines can hold, known from their artifacts: whether a server's settings fit, and how much to score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dspark_backend.errors import ConfigError
from dspark_backend.stages.artifact import DrafterArtifact, VerifierArtifact
from dspark_backend.stages.engine_contract import CONTEXT_ENGINE, DRAFT_ENGINE, VERIFIER_ENGINE, Profile
from dspark_backend.stages.tensorrt.profiles import engine_profiles


def check_engines(
    verifier: VerifierArtifact, drafter: DrafterArtifact | None, max_slots: int, prefill_chunk: int
) -> None:
    """Make sure that engines hold the largest steps that these settings allow. Other runtimes hold any.

    Raises:
        ConfigError: some step would find no profile; better at the load than when the first one is as large.
        ArtifactError: an engine's profiles are not in its artifact.
    """
    block = drafter.block_size if drafter is not None else 0
    advice = f"slots={max_slots},prefill_chunk={prefill_chunk}"
    if verifier.engine is not None:
        chunk = min(prefill_chunk, verifier.max_context)
        tokens = max_slots * (block + 1)
        profiles = engine_profiles(verifier.engine, VERIFIER_ENGINE, ("B", "N", "R", "Q"))
        again = f"{advice},block_size={block}" if block else advice
        verify = {"B": tokens, "N": tokens, "R": max_slots, "Q": block + 1}
        _check("max_slots", f"{max_slots} requests with {block} drafts each", VERIFIER_ENGINE, profiles, verify, again)
        prefill = {"B": chunk, "N": min(max_slots, chunk), "R": max_slots, "Q": chunk}
        _check("prefill_chunk", f"{chunk} tokens of a prompt", VERIFIER_ENGINE, profiles, prefill, again)
    if drafter is not None and drafter.engine is not None:
        blocks = f"blocks of {max_slots} requests"
        sizes = {"D": max_slots, "R": max_slots}
        profiles = engine_profiles(drafter.engine, DRAFT_ENGINE, tuple(sizes))
        _check("max_slots", blocks, DRAFT_ENGINE, profiles, sizes, advice)
        profiles = engine_profiles(drafter.engine, CONTEXT_ENGINE, ("R",))
        _check("max_slots", f"the context of {max_slots} requests", CONTEXT_ENGINE, profiles, {"R": max_slots}, advice)


def largest_scored(artifact: VerifierArtifact, most: int) -> int:
    """Most tokens of one prompt, up to ``most``, of which a single step gives all logits.

    Raises:
        ArtifactError: an engine's profiles are not in its artifact.
    """
    if artifact.engine is None:
        return most
    symbols = ("B", "N", "Q")
    profiles = engine_profiles(artifact.engine, VERIFIER_ENGINE, symbols)
    return min(most, max(min(profile.ranges[symbol].high for symbol in symbols) for profile in profiles))


def _check(
    setting: str, what: str, engine: str, profiles: Sequence[Profile], sizes: Mapping[str, int], again: str
) -> None:
    if any(profile.holds(sizes) for profile in profiles):
        return
    wanted = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
    found = "; ".join(
        f"{profile.name} up to {', '.join(f'{symbol}={profile.ranges[symbol].high}' for symbol in sizes)}"
        for profile in profiles
    )
    raise ConfigError(
        f"{setting}: expected a profile of {engine} for {what} ({wanted}), got {found}; lower {setting}, or build the "
        f"engine again: dspark-export engine --profiles {again}"
    )
