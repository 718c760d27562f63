"""The language model of a multimodal checkpoint, under the names of a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping

from dspark_export.weights import WeightSource
from dspark_export.weights.wrapped import WrappedWeights

_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Beginnings of stored names, by new and old versions of transformers -> what a checkpoint without images has."""


class LanguageModelWeights(WrappedWeights):
    """A source whose config has a ``text_config``: tensors of its language model by their plain names."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source)
        self._stored = {_plain(name): name for name in sorted(source.names())}

    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def _stored_name(self, name: str) -> str:
        return self._stored.get(name, name)


def _plain(name: str) -> str:
    for nested, plain in _PREFIXES.items():
        if name.startswith(nested):
            return plain + name.removeprefix(nested)
    return name


def language_model(source: WeightSource) -> WeightSource:
    """The source itself, or its language model where it is multimodal."""
    return LanguageModelWeights(source) if isinstance(source.config.get("text_config"), Mapping) else source
