"""What the decoders of Gemma 3 and Gemma 4 have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Attention, Decoder
from dspark_export.families.common import embedding_scale


def gemma_decoder(
    config: Mapping[str, Any],
    family: str,
    attentions: tuple[Attention, ...],
    norm_offset: bool = False,
    layer_scalar: bool = False,
) -> Decoder:
    """Decoder of a config with all its defaults filled in. ``attentions``: one a layer."""
    return Decoder(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        norm_eps=config["rms_norm_eps"],
        attention=attentions[0],
        attentions=attentions,
        tied_embedding=bool(config["tie_word_embeddings"]),
        max_position=config["max_position_embeddings"],
        activation="gelu_tanh",
        norm_offset=norm_offset,
        branch_norms=True,
        layer_scalar=layer_scalar,
        embedding_scale=embedding_scale(config),
        logit_cap=config.get("final_logit_softcapping"),
    )
