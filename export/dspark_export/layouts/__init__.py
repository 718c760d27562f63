"""Layouts of drafter checkpoints: config.json and tensor names -> one :class:`DrafterSpec` and one set of names.

Whatever the layout, what comes out has the tensor names of the released one (a DeepSeek-V4 drafter's layers, those of
its target), and a ``d2t`` that holds target token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.drafter_spec import DrafterSpec
from dspark_export.layouts import deepseek, released, speculators
from dspark_export.weights import WeightSource


def describe_checkpoint(config: Mapping[str, Any]) -> DrafterSpec:
    """The drafter that a config.json describes, in whichever layout.

    Raises:
        ExportError: a drafter of another algorithm, a missing key, or a value that cannot be built; the message names
            it.
    """
    if speculators.recognise(config):
        return speculators.describe(config)
    if deepseek.recognise(config):
        return deepseek.describe(config)
    return released.describe(config)


def read_drafter(weights: WeightSource) -> tuple[DrafterSpec, WeightSource]:
    """The drafter in a checkpoint, and its tensors under the released names.

    Raises:
        ExportError: as ``describe_checkpoint``; or a tensor is missing, has another shape, or is one we do not know.
    """
    config = weights.config
    if deepseek.recognise(config):
        spec = deepseek.describe(config)
        deepseek.check(spec, weights)
        return spec, deepseek.rename(spec, weights)
    spec = describe_checkpoint(config)
    offsets = speculators.recognise(config) or "t2d" in weights.names()
    return spec, speculators.rename(spec, weights) if offsets else weights
