"""Where weights come from: one small protocol, an implementation a file format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from dspark_export.errors import ExportError


class WeightSource(Protocol):
    """A checkpoint whose tensors are read one at a time, under their Hugging Face names."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's config.json, or what a GGUF header says in its terms."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that make up the checkpoint, for the source hash."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without reading it. Raises ExportError where it does not exist."""

    def names(self) -> frozenset[str]:
        """All tensors of the checkpoint."""

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as stored (float32, float16 or bfloat16). Raises ExportError where it cannot be read."""


def require_unquantised(config: Mapping[str, Any], what: str) -> None:
    """Make sure that config.json announces plain floats. ``what`` names the checkpoint in the message.

    Raises:
        ExportError: the checkpoint is quantised (fp8, gptq, awq, bitsandbytes, compressed-tensors ...); the method is
            named.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return
    method = settings.get("quant_method") or settings.get("quant_algo") if isinstance(settings, Mapping) else None
    # Nobody has the originals of those that were released quantised.
    released = str(config.get("model_type", "")).startswith("deepseek_v4")
    raise ExportError(
        f"{what}: expected weights in float32, float16 or bfloat16, got a checkpoint quantised with "
        f"{method or 'a method config.json does not name'}; "
        f"{'dequantise it to bfloat16 first' if released else 'export the original checkpoint'}"
    )
