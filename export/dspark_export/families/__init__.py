"""Model families: from a Hugging Face config to a :class:`~dspark_export.decoder.Decoder`.

A family registers under the ``model_type`` of its config. To add one, write a module with a ``describe`` function and
list it in ``_FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dspark_export.decoder import Decoder
from dspark_export.errors import ExportError
from dspark_export.families import deepseek_v4, gemma3, gemma4, llama_like
from dspark_export.families.common import text_config

_FAMILIES: dict[str, Callable[[Mapping[str, Any]], Decoder]] = {
    "deepseek_v4": deepseek_v4.describe,
    "gemma3_text": gemma3.describe,
    "gemma4_text": gemma4.describe,
    "gemma4_unified_text": gemma4.describe,
    "llama": llama_like.describe,
    "qwen3": llama_like.describe,
}
_MULTIMODAL = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
"""model_type of configs whose text_config is what we build -> the model_type of that."""


def describe(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a checkpoint's config.json describes; of a multimodal one, its language model.

    Raises:
        ExportError: the model_type is unknown, a key is missing, or a value is one we cannot build.
    """
    outer = config.get("model_type")
    text = text_config(config)
    # The text_config of a family that we do not know is not taken for one that we do.
    model_type = _MULTIMODAL.get(str(outer), outer)
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ExportError(
            f"model_type: expected one of {', '.join(sorted({*_FAMILIES, *_MULTIMODAL}))}, got {model_type!r}; "
            "this architecture is not supported"
        )
    try:
        return family({**text, "model_type": text.get("model_type") or model_type})
    except KeyError as missing:
        raise ExportError(f"config.json: expected the key {missing} for model_type {model_type!r}") from missing
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ExportError(f"config.json: {error}") from error
