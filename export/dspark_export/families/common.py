"""Readings of a Hugging Face config that several families share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dspark_export.decoder import Rope, RopeScaling
from dspark_export.families import yarn

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (SLIDING, FULL)


_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Keys without which a rope_type says nothing; transformers has no default for them."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model, with what a multimodal one says beside it."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    beside = {key: config[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in config}
    return {**beside, **nested}


def head_dim(config: Mapping[str, Any]) -> int:
    """Channels of a head: stated, or the hidden size split evenly."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def require(config: Mapping[str, Any], key: str, expected: Any, missing: Any = None) -> None:
    """Raise ValueError unless a key has the one value that the graph reproduces; null and False are the same.

    ``missing``: what an absent key means.
    """
    found = config.get(key, missing)
    if found != expected and (found or expected):
        raise ValueError(f"{key}: expected {_shown(expected)}, got {_shown(found)}; models with that are not supported")


def _shown(value: Any) -> str:
    """A value of a config as its file has it; text in single quotes."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Rotary embedding of a config, in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters).

    Raises:
        ValueError: a rope_type that the graph cannot reproduce, or rotation of a part of the head.
    """
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    parameters["rope_theta"] = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return rope(
        parameters, head_dim(config), config["max_position_embeddings"], ("default", "linear", "llama3", "yarn")
    )


def rope(parameters: Mapping[str, Any], dim: int, max_position: int, kinds: tuple[str, ...]) -> Rope:
    """Rotary embedding of heads of ``dim`` channels, from the rope_parameters of a layer.

    Raises:
        ValueError: a rope_type that is not one of ``kinds``, one without its factors, or rotation of a part of the head
            by another kind than proportional.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in (*kinds, "factors"):
        raise ValueError(f"rope_type: expected {', '.join(kinds[:-1])} or {kinds[-1]}, got {kind!r}")
    for key in _REQUIRED.get(kind, ()):
        if parameters.get(key) is None:
            raise ValueError(f"rope_parameters: expected the key {key!r} for rope_type {kind!r}")
    rotated = float(parameters.get("partial_rotary_factor") or 1.0)
    if kind != "proportional" and rotated != 1.0:
        raise ValueError("partial_rotary_factor: expected 1.0; rotating a part of the head is not supported")
    theta = float(parameters["rope_theta"])
    original = int(parameters.get("original_max_position_embeddings") or max_position)
    if kind == "yarn":
        divisors, amplitude = yarn.divisors(parameters, Rope(dim, theta), original), yarn.amplitude(parameters)
        return Rope(dim, theta, RopeScaling("factors", divisors=divisors, amplitude=amplitude))
    scaling = RopeScaling(
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_position=original,
        divisors=tuple(parameters.get("divisors", ())),
        rotated=rotated,
    )
    return Rope(dim, theta, scaling)


def rope_by_layer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope_parameters of a config that states them by attention kind; empty where it does not.

    Raises:
        ValueError: they are stated for all layers at once, which such a family does not read.
    """
    found: Mapping[str, Any] = config.get("rope_parameters") or {}
    if found and not set(LAYER_TYPES) & set(found):
        raise ValueError(f"rope_parameters: expected some for {' and '.join(LAYER_TYPES)}, got {', '.join(found)}")
    return found


def layer_types(config: Mapping[str, Any], pattern: int) -> tuple[str, ...]:
    """Attention kind of every layer; where the config does not say, each ``pattern``-th is global.

    Raises:
        ValueError: a kind that is neither sliding nor full attention.
    """
    count = config["num_hidden_layers"]
    found = config.get("layer_types") or [FULL if (layer + 1) % pattern == 0 else SLIDING for layer in range(count)]
    if unknown := sorted({str(kind) for kind in found} - set(LAYER_TYPES)):
        raise ValueError(f"layer_types: expected {' or '.join(LAYER_TYPES)}, got {', '.join(unknown)}")
    return tuple(found)


def window(config: Mapping[str, Any], kind: str) -> int | None:
    """Tokens that a layer of this attention kind sees; None for all.

    Raises:
        ValueError: the layer is a sliding one, and the config does not say how wide.
    """
    if kind != SLIDING:
        return None
    if config["sliding_window"] is None:
        raise ValueError("sliding_window: expected a number of tokens, got null")
    return int(config["sliding_window"])


def embedding_scale(config: Mapping[str, Any]) -> float:
    """sqrt(hidden_size) in the checkpoint's dtype: ``transformers`` rounds the factor to it (55.43 to 55.5 in
    bfloat16), and so did the training. A checkpoint in float32 has it exact."""
    scale = np.float32(config["hidden_size"] ** 0.5)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if stored == "bfloat16":
        return float(scale.astype(ml_dtypes.bfloat16))
    return float(scale.astype(np.float16)) if stored == "float16" else float(scale)
