"""DeepSeek-V4 tensors under the names of released checkpoints, whoever wrote the files."""

from __future__ import annotations

from dspark_export.weights import WeightSource
from dspark_export.weights.wrapped import WrappedWeights

_SPELLINGS = {
    "model.embed_tokens.weight": ("embed.weight",),
    "lm_head.weight": ("head.weight",),
    "norm.weight": ("model.norm.weight",),
    "hc_head_fn": ("model.hc_head.hc_fn", "hc_head.hc_fn"),
    "hc_head_base": ("model.hc_head.hc_base", "hc_head.hc_base"),
    "hc_head_scale": ("model.hc_head.hc_scale", "hc_head.hc_scale"),
}


class ReleasedNames(WrappedWeights):
    """A source that finds ``layers.<i>.attn.wq_a.weight`` and the like also where ``transformers`` saved the model.

    Embedding and LM head are known by the names they have in every exported graph.
    """

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source)
        self._names = source.names()

    def names(self) -> frozenset[str]:
        return self._names

    def _stored_name(self, name: str) -> str:
        # transformers writes the norm of the latent as it writes those of compressors.
        saved = name.replace(".attn.kv_norm.", ".attn.norm.")
        spellings = (name, f"model.{name}", saved, f"model.{saved}", *_SPELLINGS.get(name, ()))
        return next((spelling for spelling in spellings if spelling in self._names), name)
