"""The layout of the ``speculators`` library (``speculators_model_type: dspark``), which vLLM serves as well.

It follows ``speculators/models/dspark/config.py`` and ``vllm/transformers_utils/configs/speculators/algos.py``:

- ``transformer_layer_config`` is the backbone, written as a *difference* from its class's defaults: what is missing has
  the default of ``Qwen3Config`` or ``LlamaConfig``.
- ``aux_hidden_state_layer_ids`` counts hidden states, the embedding being 0: the output of layer ``id`` is ``id + 1``.
- ``sample_from_anchor``: slot 0, the anchor's, predicts too, as DSpark has it. Otherwise only the mask slots predict,
  each its own position; that is another block, and refused. Files from before the key existed are of that kind (vLLM
  serves them so), so that the key must be there: a wrong guess would draft text shifted by one.
- Layers of ``layer_types`` sliding_attention see the ``sliding_window`` positions before the anchor, whatever the slot,
  and of their block no slot behind them unless ``sliding_window_non_causal``. Full attention sees the whole block.
- Tensors have the released names. With ``draft_vocab_size`` below the target's, ``d2t`` [Vd] int64 holds *offsets*
  (target id = draft id + d2t[draft id]), ``t2d`` [V] bool marks the kept tokens, and ``lm_head`` has Vd rows.
- ``verifier_norm``, ``verifier_lm_head`` and ``mask_embedding`` serve the training alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_export.drafter_spec import DrafterSpec, describe_drafter
from dspark_export.errors import ExportError
from dspark_export.weights import WeightSource
from dspark_export.weights.wrapped import WrappedWeights

_ARCHITECTURES = {"qwen3": "Qwen3DSparkModel", "llama": "LlamaDSparkModel"}
_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LAYER_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": _COMMON_DEFAULTS
    | {"vocab_size": 151936, "intermediate_size": 22016, "head_dim": 128, "max_position_embeddings": 32768},
    "llama": _COMMON_DEFAULTS | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
}
"""What the configuration classes of ``transformers`` say where a config is silent."""

_HEAD_DEFAULTS: dict[str, Any] = {
    "block_size": 8,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
_KNOWN = re.compile(
    r"(layers\.\d+|fc|norm|hidden_norm|embed_tokens|lm_head|verifier_norm|verifier_lm_head|markov_head|confidence_head)\.\S+"
    r"|d2t|t2d|mask_embedding"
)


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout, for whatever drafting method."""
    return any(key in config for key in ("speculators_model_type", "speculators_config", "transformer_layer_config"))


def describe(config: Mapping[str, Any]) -> DrafterSpec:
    """The drafter that a config.json of this layout describes.

    Raises:
        ExportError: it is for another drafting method, a key is missing, or a value is one we cannot build.
    """
    method = config.get("speculators_model_type") or (config.get("speculators_config") or {}).get("algorithm")
    if method != "dspark":
        raise ExportError(
            f"drafter config.json: expected speculators_model_type 'dspark', got {method!r}; drafters for "
            f"{method or 'other methods'} are not supported"
        )
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise ExportError("drafter config.json: expected the key 'transformer_layer_config', an object")
    family = layer.get("model_type", "qwen3")
    if family not in LAYER_DEFAULTS:
        raise ExportError(
            f"transformer_layer_config.model_type: expected one of {', '.join(LAYER_DEFAULTS)}, got {family!r}"
        )
    backbone = LAYER_DEFAULTS[family] | {"model_type": family} | dict(layer)
    _require_plain_block(config, backbone)
    counted = config.get("aux_hidden_state_layer_ids")
    if not isinstance(counted, list) or not counted or any(not isinstance(i, int) or i < 1 for i in counted):
        raise ExportError(
            f"aux_hidden_state_layer_ids: expected hidden states counted from 1 (layer + 1), got {counted!r}"
        )
    if config.get("mask_token_id") is None:
        raise ExportError("drafter config.json: expected the key 'mask_token_id'")
    heads = {key: config.get(key, default) for key, default in _HEAD_DEFAULTS.items()}
    flat = backbone | heads
    # Windows are read apart: what they mean here is not what they mean in a target.
    flat |= {
        "use_sliding_window": False,
        "layer_types": None,
        "architectures": [_ARCHITECTURES[family]],
        "target_layer_ids": [index - 1 for index in counted],
        "mask_token_id": config["mask_token_id"],
        "draft_vocab_size": config.get("draft_vocab_size"),
    }
    return _with_windows(describe_drafter(flat), _windows(backbone), bool(config.get("sliding_window_non_causal")))


def _with_windows(spec: DrafterSpec, windows: Sequence[int | None], both_ways: bool) -> DrafterSpec:
    if set(windows) == {None}:
        return spec
    attentions = tuple(replace(spec.decoder.attention, window=window) for window in windows)
    return replace(spec, decoder=replace(spec.decoder, attentions=attentions), causal_windows=not both_ways)


def _windows(backbone: Mapping[str, Any]) -> list[int | None]:
    """The window of every layer, None for full attention."""
    count, size = backbone["num_hidden_layers"], backbone.get("sliding_window")
    if backbone["model_type"] == "qwen3":  # whose class drops a window that is not used
        size = backbone.get("sliding_window", 4096) if backbone.get("use_sliding_window") else None
    kinds = backbone.get("layer_types")
    if kinds is None:
        first = backbone.get("max_window_layers", 28) if size is not None else count
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(count)]
    if len(kinds) != count or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ExportError(
            f"layer_types: expected full_attention or sliding_attention for each of {count} layers, got "
            f"{', '.join(map(str, kinds))}"
        )
    if "sliding_attention" in kinds and (not isinstance(size, int) or size < 1):
        raise ExportError(
            f"sliding_window: expected a number of positions for layers with sliding_attention, got {size!r}"
        )
    return [size if kind == "sliding_attention" else None for kind in kinds]


def _require_plain_block(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> None:
    """Refuse variants whose graph differs from DSpark's."""
    anchored = config.get("sample_from_anchor")
    if anchored is None:
        raise ExportError(
            "sample_from_anchor: expected true, got none; drafters from before the key existed predict from the mask "
            "slots alone, which is not supported. If this one was trained to predict from its anchor, add the key"
        )
    if not anchored:
        raise ExportError(
            "sample_from_anchor: expected true, got false; blocks in which only the mask slots predict are not "
            "supported"
        )
    if config.get("markov_rank") == 0:
        raise ExportError(
            "markov_rank: expected at least 1, got 0; drafters without a sequential head are not supported"
        )
    if config.get("draft_adapter_rank"):
        raise ExportError(f"draft_adapter_rank: expected 0, got {config['draft_adapter_rank']}; it is not supported")
    width, target = backbone["hidden_size"], config.get("target_hidden_size")
    if target is not None and target != width:
        raise ExportError(
            f"target_hidden_size: expected the drafter's own {width}, got {target}; a drafter shares the target's "
            "embedding, so both must be equal"
        )


def rename(spec: DrafterSpec, weights: WeightSource) -> WeightSource:
    """The tensors under the released names, ``d2t`` as target token ids.

    Raises:
        ExportError: there is a tensor that the layout does not have, or the token table is missing or damaged.
    """
    unknown = sorted(name for name in weights.names() if not _KNOWN.fullmatch(name))
    if unknown:
        raise ExportError(f"drafter: expected the tensors of a DSpark drafter, got {', '.join(unknown[:3])} as well")
    if spec.draft_vocab_size == spec.decoder.vocab_size:
        return weights
    if "d2t" not in weights.names():
        raise ExportError(
            f"drafter: expected the tensor d2t, since draft_vocab_size {spec.draft_vocab_size} is not the vocabulary "
            f"({spec.decoder.vocab_size}); no shard holds it"
        )
    return _TargetIds(weights, _target_ids(spec, weights))


def _target_ids(spec: DrafterSpec, weights: WeightSource) -> NDArray[np.int64]:
    size, vocab = spec.draft_vocab_size, spec.decoder.vocab_size
    if weights.shape("d2t") != (size,):
        raise ExportError(f"d2t: expected shape ({size},), got {weights.shape('d2t')}")
    ids = weights.read("d2t").astype(np.int64) + np.arange(size)
    if ids.min() < 0 or ids.max() >= vocab or len(np.unique(ids)) != size:
        raise ExportError(
            f"d2t: expected offsets to {size} different token ids below {vocab}, got ids from {ids.min()} to "
            f"{ids.max()}, {len(np.unique(ids))} of them different"
        )
    if "t2d" in weights.names():
        kept = np.flatnonzero(weights.read("t2d"))
        if not np.array_equal(kept, np.sort(ids)):
            raise ExportError(f"t2d: expected to mark the {size} tokens of d2t, got {len(kept)} tokens, other ones")
    return ids


class _TargetIds(WrappedWeights):
    """A weight source whose ``d2t`` holds target token ids."""

    def __init__(self, weights: WeightSource, ids: NDArray[np.int64]) -> None:
        super().__init__(weights)
        self._ids = ids

    def read(self, name: str) -> NDArray[Any]:
        return self._ids if name == "d2t" else super().read(name)
