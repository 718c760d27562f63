"""Whether a checkpoint's tensors are those of the model that its config describes."""

from __future__ import annotations

import hashlib

import numpy as np

from dspark_export.decoder import Decoder
from dspark_export.errors import ExportError
from dspark_export.layer_tensors import layer_shapes, unread
from dspark_export.weights import WeightSource

_TEXT = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
"""How names of the language model begin; a multimodal checkpoint has others besides."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_tensors(decoder: Decoder, weights: WeightSource, name: str) -> None:
    """Make sure that every tensor is there in its shape, and that there is none of a larger or another model. Headers
    are read, and a head that should be the embedding.

    Raises:
        ExportError: a tensor is missing, has another shape, or is one that the graph would leave out.
    """
    expected = expected_shapes(decoder)
    for tensor, shape in expected.items():
        if (got := weights.shape(tensor)) != shape:
            raise ExportError(
                f"{tensor}: expected shape {shape} as config.json says, got {got}; the checkpoint's files do not "
                "belong together"
            )
    if decoder.tied_embedding and _HEAD in weights.names() and _digest(weights, _HEAD) != _digest(weights, _EMBEDDING):
        raise ExportError(
            f"model {name}: expected {_HEAD} to be a copy of {_EMBEDDING}, as tie_word_embeddings says, got another "
            'matrix; with "tie_word_embeddings": false in config.json it is used, without the tensor it is not'
        )
    known = {*expected, _HEAD} if decoder.tied_embedding else {*expected}
    unknown = unread(weights, known, _TEXT)
    if unknown:
        raise ExportError(
            f"model {name}: expected the tensors of {decoder.num_layers} {decoder.family} layers as config.json says, "
            f"got {unknown} as well, which that model does not have; the checkpoint's files do not belong "
            "together, or it is of another architecture"
        )


def expected_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor that the graph of a decoder in the layout of Llama reads, with its shape."""
    table = (decoder.vocab_size, decoder.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: table, "model.norm.weight": (decoder.hidden_size,)}
    if not decoder.tied_embedding:
        shapes[_HEAD] = table
    for layer in range(decoder.num_layers):
        shapes |= layer_shapes(decoder, layer, f"model.layers.{layer}")
    return shapes


def _digest(weights: WeightSource, name: str) -> bytes:
    """Of a matrix: the two that are compared are not in memory together."""
    return hashlib.sha256(np.ascontiguousarray(weights.read(name)).view(np.uint8).data).digest()
