"""Model families: from a Hugging Face config to a :class:`~dspark_export.decoder.Decoder`.

A family registers under the ``model_type`` of its config. To add one, write a module with a ``describe`` function and
list it in ``_FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dspark_export.decoder import Decoder
from dspark_export.errors import ExportError
from dspark_export.families import llama, qwen3

_FAMILIES: dict[str, Callable[[Mapping[str, Any]], Decoder]] = {
    "llama": llama.describe,
    "qwen3": qwen3.describe,
}


def describe(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a checkpoint's config.json describes.

    Raises:
        ExportError: the model_type is unknown, a key is missing, or a value is one we cannot build.
    """
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ExportError(
            f"model_type: expected one of {', '.join(sorted(_FAMILIES))}, got {model_type!r}; "
            "this architecture is not supported"
        )
    try:
        return family(config)
    except KeyError as missing:
        raise ExportError(f"config.json: expected the key {missing} for model_type {model_type!r}") from missing
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ExportError(f"config.json: {error}") from error
