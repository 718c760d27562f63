"""A DSpark drafter as data, and the reading of released checkpoints (DESIGN, "Checkpoints we read", layout 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dspark_export.decoder import Decoder
from dspark_export.errors import ExportError
from dspark_export.families import describe

HeadKind = Literal["vanilla", "gated", "rnn"]

_ARCHITECTURES = ("Qwen3DSparkModel", "LlamaDSparkModel", "Gemma4DSparkModel")


@dataclass(frozen=True)
class DrafterSpec:
    """Backbone, sequential head and confidence head of a drafter."""

    decoder: Decoder
    """The backbone's layers. Its vocabulary is the target's."""
    block_size: int
    """gamma: tokens drafted a round."""
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    markov_rank: int
    head: HeadKind
    confidence: bool
    """Whether there is a confidence head; without one every draft counts as certain."""
    confidence_with_markov: bool
    """Whether the confidence head sees W1[x_{k-1}] beside h_k."""
    draft_vocab_size: int
    """Tokens the drafter can propose; smaller than the vocabulary where ``d2t`` maps them."""
    confidence_bias: bool = True
    """Whether the confidence head adds a number of the checkpoint."""
    causal_windows: bool = False
    """Whether, in layers with a sliding window, slots see none of those behind them. A window counts positions before
    the anchor, the same for every slot."""

    @property
    def feature_size(self) -> int:
        return len(self.target_layer_ids) * self.decoder.hidden_size


def describe_drafter(config: Mapping[str, Any]) -> DrafterSpec:
    """The drafter that a released checkpoint's config.json describes.

    Raises:
        ExportError: another architecture, a missing key, or a value we cannot build.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in _ARCHITECTURES:
        raise ExportError(
            f"drafter config.json: expected architectures[0] to be one of {', '.join(_ARCHITECTURES)}, "
            f"got {architecture!r}"
        )
    decoder = describe(config)
    for key in ("block_size", "mask_token_id", "markov_rank"):
        if key in config and type(config[key]) is not int:
            raise ExportError(f"drafter config.json: {key}: expected a whole number, got {config[key]!r}")
    layers = config.get("target_layer_ids", [])
    if not isinstance(layers, list | tuple) or any(type(layer) is not int for layer in layers):
        raise ExportError(f"drafter config.json: target_layer_ids: expected a list of layers, got {layers!r}")
    try:
        head = config["markov_head_type"]
        spec = DrafterSpec(
            decoder=decoder,
            block_size=config["block_size"],
            target_layer_ids=tuple(config["target_layer_ids"]),
            mask_token_id=config["mask_token_id"],
            markov_rank=config["markov_rank"],
            head=head,
            confidence=bool(config.get("enable_confidence_head", False)),
            confidence_with_markov=bool(config.get("confidence_head_with_markov", False)),
            draft_vocab_size=config.get("draft_vocab_size") or decoder.vocab_size,
        )
    except KeyError as missing:
        raise ExportError(f"drafter config.json: expected the key {missing}") from missing
    if len(set(decoder.layer_attentions)) > 1 or decoder.attention.window is not None:
        raise ExportError("drafter config.json: layer_types: expected full_attention in every layer")
    if head not in ("vanilla", "gated", "rnn"):
        raise ExportError(f"markov_head_type: expected vanilla, gated or rnn, got {head!r}")
    if not 1 <= spec.block_size <= 64:
        raise ExportError(f"block_size: expected 1 to 64, got {spec.block_size}")
    if not 0 <= spec.mask_token_id < decoder.vocab_size:
        raise ExportError(f"mask_token_id: expected a token below {decoder.vocab_size}, got {spec.mask_token_id}")
    return spec
