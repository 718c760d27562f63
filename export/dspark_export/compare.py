"""Comparison of an exported verifier with ``transformers``, where that and torch are installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_backend.stages.onnxruntime_verifier import OnnxRuntimeVerifier
from dspark_export.check import prompt_logits
from dspark_export.errors import ExportError

LARGEST_DIFFERENCE = 1e-3
"""Between logits of float32 exports; the runtimes sum in different orders."""

_TOKENS = 64


@dataclass(frozen=True)
class Comparison:
    """Logits of both over the same tokens."""

    tokens: int
    largest_difference: float
    same_argmax: float
    """Share of positions with the same most probable token."""


def require_transformers() -> None:
    """Raises ExportError where torch or transformers is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"--check-against-transformers needs torch and transformers ({error}); "
            "run: pip install torch==2.13.0 transformers"
        ) from error


def load_reference(path: Path) -> Any:
    """The checkpoint as a float32 ``transformers`` model on the CPU.

    Raises:
        ExportError: torch or transformers is not installed.
    """
    require_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


def compare_with_transformers(path: Path, artifact_directory: Path) -> Comparison:
    """Logits of a run of varied tokens, from both.

    Raises:
        ExportError: torch is missing, or a float32 export differs by more than LARGEST_DIFFERENCE.
    """
    reference = load_reference(path)
    import torch

    stage = OnnxRuntimeVerifier(artifact_directory)
    count = min(_TOKENS, stage.artifact.max_context)
    token_ids = np.random.default_rng(1).integers(0, stage.artifact.vocab_size, count)
    ours = prompt_logits(stage, token_ids.tolist(), count)
    stage.close()
    with torch.inference_mode():
        theirs = reference(torch.from_numpy(token_ids)[None]).logits[0].numpy()
    result = Comparison(
        tokens=count,
        largest_difference=float(np.abs(ours - theirs).max()),
        same_argmax=float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
    )
    if stage.artifact.dtype == "float32" and result.largest_difference > LARGEST_DIFFERENCE:
        raise ExportError(
            f"the exported graph differs from transformers: expected logits within {LARGEST_DIFFERENCE}, "
            f"got a difference of {result.largest_difference:.2e}"
        )
    return result
