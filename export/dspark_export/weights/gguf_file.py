"""A GGUF file: its header in the terms of a Hugging Face config, its tensors dequantised one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from dspark_export.errors import ExportError
from dspark_export.families import yarn

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


_TABLE = "attn_rot_embd"
"""A buffer of old files, which follows from the header."""


def _hugging_face_name(name: str) -> str | None:
    """What a Hugging Face folder calls a tensor; None for one that is no weight of the language model. Tensors of a
    layer that we do not know keep their own name there, for whoever compares them with the config."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    if parts[0] != "blk" or _TABLE in parts:
        return None
    if len(parts) == 4 and parts[2] in _IN_LAYER:
        parts[2] = _IN_LAYER[parts[2]]
    return f"model.layers.{'.'.join(parts[1:])}"


def _undo_rope_permutation(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a llama q or k projection in the half-split order of Hugging Face.

    GGUF files of the llama architecture store each head's rows for interleaved rotation: pair (i, i + d/2) at rows
    (2i, 2i + 1).
    """
    grouped = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(rows.shape)


class GgufFile:
    """Weights of a GGUF file, dequantised to float32.

    Raises:
        ExportError: not a GGUF file, a part of one, or of an architecture we cannot build.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.reader = gguf.GGUFReader(str(path))
        except Exception as error:  # the reader raises whatever it trips over
            raise ExportError(f"{path}: not a complete GGUF file ({error}); download it again") from error
        self._tensors = {
            renamed: tensor
            for tensor in self.reader.tensors
            if (renamed := _hugging_face_name(tensor.name)) is not None
        }
        self._config = self._read_config()

    def field(self, key: str, default: Any = None) -> Any:
        """The value of a header field, or ``default``."""
        found = self.reader.get_field(key)
        return default if found is None else found.contents()

    def _read_config(self) -> dict[str, Any]:
        architecture = self.field("general.architecture")
        if architecture not in ("llama", "qwen3"):
            raise ExportError(
                f"{self._path}: expected general.architecture llama or qwen3, got {architecture!r}; "
                "export other families from their Hugging Face folder"
            )

        if (parts := self.field("split.count", 1)) > 1:
            raise ExportError(
                f"{self._path}: expected a whole model, got one of {parts} parts; join them first: "
                "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            )
        if experts := self.field(f"{architecture}.expert_count", 0):
            raise ExportError(
                f"{self._path}: expected a dense model, got {architecture}.expert_count {experts}; mixtures of experts "
                "are not supported"
            )

        def required(key: str) -> Any:
            value = self.field(f"{architecture}.{key}")
            if value is None:
                raise ExportError(f"{self._path}: expected the header field {architecture}.{key}, found none")
            if not isinstance(value, float | int) or value <= 0:
                raise ExportError(
                    f"{self._path}: header field {architecture}.{key}: expected one number above 0 for all layers, got "
                    f"{value}"
                )
            return value

        heads, hidden = required("attention.head_count"), required("embedding_length")
        head_dim = self.field(f"{architecture}.attention.key_length", hidden // heads)
        rotated = self.field(f"{architecture}.rope.dimension_count", head_dim)
        return {
            "model_type": architecture,
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": hidden,
            "intermediate_size": required("feed_forward_length"),
            "num_hidden_layers": required("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field(f"{architecture}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "partial_rotary_factor": rotated / head_dim,
            "rms_norm_eps": required("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.field(f"{architecture}.rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(architecture),
            "max_position_embeddings": required("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": self._has_bias("self_attn."),
            "mlp_bias": self._has_bias("mlp."),
        }

    def _has_bias(self, block: str) -> bool:
        return any(f".{block}" in name and name.endswith(".bias") for name in self._tensors)

    def _rope_scaling(self, architecture: str) -> dict[str, Any]:
        for tensor in self.reader.tensors:
            if tensor.name == "rope_freqs.weight":
                return {"rope_type": "factors", "divisors": np.asarray(tensor.data, np.float32).tolist()}
        # As llama.cpp reads them: a factor alone stretches linearly, and old files have another name for it.
        factor = self.field(f"{architecture}.rope.scaling.factor") or self.field(f"{architecture}.rope.scale_linear")
        kind = self.field(f"{architecture}.rope.scaling.type", "linear")
        if kind == "none" or (kind == "linear" and not factor):
            return {}
        found = {"rope_type": kind, "factor": factor or 1.0}
        return found | self._yarn(f"{architecture}.rope.scaling", found) if kind == "yarn" else found

    def _yarn(self, prefix: str, scaling: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("yarn_ext_factor", "yarn_attn_factor"):
            if self.field(f"{prefix}.{name}", 1.0) != 1.0:
                raise ExportError(f"{self._path}: header field {prefix}.{name}: expected 1, or none")
        # Beside what follows from the factor, not in its place as in a config.json.
        stated = self.field(f"{prefix}.attn_factor", 1.0)
        return {
            "original_max_position_embeddings": self.field(f"{prefix}.original_context_length"),
            "beta_fast": self.field(f"{prefix}.yarn_beta_fast"),
            "beta_slow": self.field(f"{prefix}.yarn_beta_slow"),
            "attention_factor": stated * yarn.amplitude(scaling),
        }

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def _find(self, name: str) -> gguf.ReaderTensor:
        if name not in self._tensors:
            raise ExportError(f"{self._path}: expected a tensor for {name}, found none")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._find(name).shape))

    def read(self, name: str) -> NDArray[Any]:
        tensor = self._find(name)
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ExportError(
                f"{self._path}: {tensor.name} is of type {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantise; take a file of another quantisation, or the model's Hugging Face folder"
            ) from error
        values = values.reshape(self.shape(name))
        if self._config["model_type"] == "llama" and ".self_attn.q_proj." in name:
            return _undo_rope_permutation(values, self._config["num_attention_heads"])
        if self._config["model_type"] == "llama" and ".self_attn.k_proj." in name:
            return _undo_rope_permutation(values, self._config["num_key_value_heads"])
        return values
