"""The released layout (``deepseek-ai/dspark_qwen3_8b_block7`` and its siblings): flat config.json, our own names.

A reduced vocabulary is not among the released files. What ``dspark-export train`` writes has target token ids in
``d2t``; files that bring ``t2d`` as well come from ``speculators``, and theirs are offsets.

Of other drafting methods, config.json often says which one it is; those are refused by that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.drafter_spec import DrafterSpec, describe_drafter
from dspark_export.errors import ExportError

_OTHER_METHODS = ("eagle3", "eagle", "dflash", "medusa", "hydra", "mtp", "pard", "peagle")
"""Longer names first where one is the beginning of another."""


def describe(config: Mapping[str, Any]) -> DrafterSpec:
    """The drafter of a released checkpoint.

    Raises:
        ExportError: a drafter of another method, or as ``describe_drafter``.
    """
    architecture = str((config.get("architectures") or [""])[0])
    method = other_method(architecture)
    if method is not None and "dspark" not in architecture.lower():
        raise ExportError(f"drafter config.json: expected a DSpark drafter, got one for {method} ({architecture})")
    if config.get("dspark_bonus_anchor") or config.get("sample_from_anchor") is False:
        raise ExportError(
            "drafter config.json: expected blocks that predict from their anchor, got dspark_bonus_anchor or "
            "sample_from_anchor: false; blocks in which only the mask slots predict are not supported"
        )
    if config.get("attention_sink_bias"):
        raise ExportError("attention_sink_bias: expected false, got true; attention sinks are not supported")
    return describe_drafter(config)


def other_method(name: str) -> str | None:
    """The drafting method, other than DSpark, that an architecture's name carries."""
    return next((method for method in _OTHER_METHODS if method in name.lower()), None)
