"""DeepSeek-V4 tensors under the names of released checkpoints, whoever wrote the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dspark_export.weights import WeightSource

_SPELLINGS = {
    "model.embed_tokens.weight": ("embed.weight",),
    "lm_head.weight": ("head.weight",),
    "norm.weight": ("model.norm.weight",),
    "hc_head_fn": ("model.hc_head.hc_fn", "hc_head.hc_fn"),
    "hc_head_base": ("model.hc_head.hc_base", "hc_head.hc_base"),
    "hc_head_scale": ("model.hc_head.hc_scale", "hc_head.hc_scale"),
}


class ReleasedNames:
    """A source that finds ``layers.<i>.attn.wq_a.weight`` and the like also where ``transformers`` saved the model.

    Embedding and LM head are known by the names they have in every exported graph.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._names = source.names()

    @property
    def config(self) -> Mapping[str, Any]:
        return self._source.config

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored(name))

    def read(self, name: str) -> NDArray[Any]:
        return self._source.read(self._stored(name))

    def _stored(self, name: str) -> str:
        spellings = (name, f"model.{name}", *_SPELLINGS.get(name, ()))
        return next((spelling for spelling in spellings if spelling in self._names), name)
