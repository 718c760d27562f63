"""From a run to a checkpoint in the released layout, which ``dspark-export drafter`` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dspark_backend.stages.artifact import VerifierArtifact
from dspark_backend.stages.batch import FloatArray
from dspark_export.drafter_spec import DrafterSpec, describe_drafter
from dspark_export.errors import ExportError
from dspark_export.source import open_weights, resolve_model, source_hash
from dspark_export.torch_drafter import TorchDrafter
from dspark_export.training.settings import TrainSettings
from dspark_export.weights import WeightSource

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_ARCHITECTURE_OF = {"llama": "LlamaDSparkModel", "qwen3": "Qwen3DSparkModel"}
_NOT_THE_DRAFTERS = (
    "_name_or_path", "auto_map", "dtype", "layer_types", "max_window_layers", "quantization_config", "torch_dtype",
    "transformers_version",
)  # fmt: skip
"""Keys of the target's config that say nothing, or something wrong, about its drafter."""
_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def open_target(model: str, artifact: VerifierArtifact) -> WeightSource:
    """The checkpoint that a verifier was exported from.

    Raises:
        ExportError: there is none at ``model``, or it is another one.
    """
    weights = open_weights(resolve_model(model))
    found = source_hash(weights.files)
    if found != artifact.source_hash:
        raise ExportError(
            f"--model {model}: expected the checkpoint that the verifier was exported from ({artifact.source}, source "
            f"hash {artifact.source_hash[:12]}), got one with {found[:12]}"
        )
    return weights


def drafter_config(
    target: Mapping[str, Any], artifact: VerifierArtifact, settings: TrainSettings, mask_token_id: int
) -> dict[str, Any]:
    """config.json of the drafter: the target's, with fewer layers and the drafter's own keys.

    Raises:
        ExportError: there is no drafter architecture for this family, or an option does not fit the target.
    """
    architecture = _ARCHITECTURE_OF.get(artifact.family)
    if architecture is None:
        raise ExportError(
            f"model_type {artifact.family!r}: expected one of {', '.join(_ARCHITECTURE_OF)}; no drafter of this family"
        )
    if settings.draft_vocab is not None and settings.draft_vocab > artifact.vocab_size:
        raise ExportError(
            f"--draft-vocab: expected at most the target's {artifact.vocab_size}, got {settings.draft_vocab}"
        )
    feature_columns(artifact, settings)
    config = {key: value for key, value in target.items() if key not in _NOT_THE_DRAFTERS}
    config |= {
        "architectures": [architecture],
        "num_hidden_layers": settings.layers,
        "num_target_layers": artifact.num_layers,
        "intermediate_size": settings.intermediate_size or target["intermediate_size"],
        # The graphs of a drafter have none.
        "attention_bias": False,
        "mlp_bias": False,
        "block_size": settings.block_size,
        "target_layer_ids": list(settings.target_layer_ids or artifact.target_layer_ids),
        "mask_token_id": mask_token_id,
        "markov_rank": settings.rank,
        "markov_head_type": settings.head,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    if settings.draft_vocab is not None and settings.draft_vocab < artifact.vocab_size:
        config["draft_vocab_size"] = settings.draft_vocab
    return config


def feature_columns(artifact: VerifierArtifact, settings: TrainSettings) -> Tensor | None:
    """int64: which of the verifier's features the drafter reads; None for all.

    Raises:
        ExportError: the verifier does not give them.
    """
    wanted, given = settings.target_layer_ids, artifact.target_layer_ids
    if wanted is None or wanted == tuple(given):
        return None
    if missing := sorted(set(wanted) - set(given)):
        raise ExportError(
            f"--target-layer-ids: expected layers that the verifier was exported with ({', '.join(map(str, given))}), "
            f"got {missing[0]}, too"
        )
    size = artifact.hidden_size
    return torch.cat([torch.arange(size) + given.index(layer) * size for layer in wanted])


def released_state(drafter: TorchDrafter) -> dict[str, Tensor]:
    """Parameters as a checkpoint holds them: the scale of the features is part of ``fc``."""
    state: dict[str, Tensor] = dict(drafter.state_dict())
    return state | {"fc.weight": state["fc.weight"] * drafter.feature_scale}


def spec_of(config: Mapping[str, Any]) -> DrafterSpec:
    """The drafter of a config that ``drafter_config`` made."""
    return describe_drafter(config)


def pick_mask_token(embedding: FloatArray) -> int:
    """The highest token id whose embedding [V, H] was trained: the last rows of a padded vocabulary are zeros."""
    norms = ((embedding.astype("float64") ** 2).sum(axis=1)) ** 0.5
    median = sorted(norms.tolist())[len(norms) // 2]
    return max(token for token, norm in enumerate(norms.tolist()) if norm >= 0.1 * median)


def write_checkpoint_folder(out: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: str) -> None:
    """Write config.json and model.safetensors into ``out``, each in whole or not at all.

    ``state`` has the names of the released layout; embedding and LM head are not among them: they are the target's.
    """
    out.mkdir(parents=True, exist_ok=True)
    stored = {
        name: (value if name == "d2t" else value.detach().to(_TYPES[dtype])).contiguous()
        for name, value in state.items()
    }
    scratch = out / f"{WEIGHTS_FILE}.tmp"
    scratch.write_bytes(save(stored))
    scratch.replace(out / WEIGHTS_FILE)
    scratch = out / f"{CONFIG_FILE}.tmp"
    text = json.dumps({**config, "dtype": dtype}, indent=2, ensure_ascii=False)
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(out / CONFIG_FILE)
