"""The drafter that a run starts with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark_export.drafter_spec import describe_drafter
from dspark_export.errors import ExportError
from dspark_export.torch_drafter import TorchDrafter, load_torch_drafter
from dspark_export.training.batch import Example
from dspark_export.training.export import spec_of
from dspark_export.training.markov_init import bigram_factors, start_from_bigrams
from dspark_export.training.settings import TrainSettings
from dspark_export.training.statistics import TokenStatistics, most_frequent
from dspark_export.weights import WeightSource
from dspark_export.weights.safetensors_folder import SafetensorsFolder

logger = logging.getLogger(__name__)

_QUIET_FEATURES = 0.1
"""Of the random weights behind all features but the last."""
_QUIET_LOGITS = 0.5
"""Standard deviation of the untrained backbone's logits where the bigrams are to be heard."""


def first_drafter(
    config: Mapping[str, Any],
    settings: TrainSettings,
    shared: tuple[Tensor, Tensor],
    statistics: TokenStatistics,
    feature_scale: Tensor,
    weights: WeightSource,
) -> TorchDrafter:
    """A drafter before its first step. ``shared`` are the target's embedding and LM head; draws from torch's generator.

    Raises:
        ExportError: layers are to be copied from the target, and theirs have other shapes.
    """
    drafter = TorchDrafter(spec_of(config), *shared)
    drafter.feature_scale.copy_(feature_scale)
    ids = np.arange(drafter.spec.decoder.vocab_size)
    if drafter.d2t is not None:
        ids = most_frequent(statistics.unigrams, drafter.spec.draft_vocab_size)
        drafter.d2t.copy_(torch.from_numpy(ids))
        covered = statistics.unigrams[ids].sum() / statistics.unigrams.sum()
        logger.info("the draft vocabulary covers %.2f%% of the target's probability", 100 * covered)
    if settings.init_layers == "target":
        copy_target_layers(drafter, weights)
    with torch.no_grad():
        drafter.markov_head.markov_w2.weight.normal_(0.0, 0.02)
        head = drafter.lm_head if drafter.d2t is None else drafter.lm_head[drafter.d2t]
        # The spread of logits of a random direction of unit root mean square.
        spread = float((head - head.mean(dim=0)).square().sum(dim=1).mean().sqrt())
        drafter.norm.weight.fill_(min(1.0, _QUIET_LOGITS / max(spread, 1e-6)))
        if drafter.confidence_head is not None:
            drafter.confidence_head.proj.weight.zero_()
            drafter.confidence_head.proj.bias.zero_()
    if settings.init_markov == "bigram":
        start_from_bigrams(drafter.markov_head, bigram_factors(statistics, ids, settings.rank, settings.text.seed))
    return drafter


def check_beginning(config: Mapping[str, Any], settings: TrainSettings, weights: WeightSource) -> None:
    """Make sure that a drafter of ``config`` can start as the settings say, without any text.

    Raises:
        ExportError: ``init_from`` is another drafter, or the target's layers are to be copied and do not fit.
    """
    if settings.init_from is not None:
        _check_continued(settings.init_from, config)
    elif settings.init_layers == "target":
        have, layers = weights.config["num_hidden_layers"], config["num_hidden_layers"]
        if layers > have:
            raise ExportError(f"--layers: expected at most the target's {have} to copy, got {layers}")
        theirs, ours = weights.config["intermediate_size"], config["intermediate_size"]
        if theirs != ours:
            raise ExportError(
                f"--init-layers target: expected the target's --intermediate-size {theirs}, got {ours}; "
                "give --init-layers random, or leave --intermediate-size out"
            )


def _check_continued(checkpoint: Path, config: Mapping[str, Any]) -> None:
    found, wanted = describe_drafter(SafetensorsFolder(checkpoint).config), spec_of(config)
    for field in fields(wanted):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name not in ("decoder", "mask_token_id"):
            raise ExportError(
                f"--init-from {checkpoint}: expected {field.name} {ours}, as the options say, the drafter has {theirs}"
            )
    if found.decoder != wanted.decoder:
        raise ExportError(
            f"--init-from {checkpoint}: expected layers like the target's (sizes, heads, RoPE, --layers "
            f"{wanted.decoder.num_layers}), the drafter's differ"
        )


@torch.no_grad()
def continued_drafter(checkpoint: Path, shared: tuple[Tensor, Tensor], feature_scale: Tensor) -> TorchDrafter:
    """The drafter of an earlier run, or a released one, to be trained further behind this run's scale of features.

    It keeps its own mask token.

    Raises:
        ExportError: a tensor has another shape.
    """
    drafter = load_torch_drafter(checkpoint, *shared)
    drafter.feature_scale.copy_(feature_scale)
    drafter.fc.weight.div_(feature_scale)
    return drafter


def scale_of(examples: Iterable[Example], columns: Tensor | None) -> Tensor:
    """[F]: brings every feature to a root mean square of 1 over the answers.

    A few channels of a residual stream are a hundred times larger than the rest, which would hardly be heard.
    """
    total: Tensor | None = None
    count = 0
    for example in examples:
        features = example.record.features[example.dialogue.prompt_length :]
        features = (features if columns is None else features[:, columns]).double()
        squares = features.square().sum(dim=0)
        total = squares if total is None else total + squares
        count += len(features)
    if total is None or not count:
        raise ExportError("the text holds no answer to take the size of features from; generate more")
    root = (total / count).sqrt()
    return (1.0 / root.clamp(min=1e-3 * float(root.mean()))).float()


@torch.no_grad()
def copy_target_layers(drafter: TorchDrafter, weights: WeightSource) -> None:
    """Start the layers as the target's last ones, of which there are enough, which read the last feature as they would
    in the target.

    Raises:
        ExportError: a tensor has another shape.
    """
    first = weights.config["num_hidden_layers"] - drafter.spec.decoder.num_layers

    def read(name: str, shape: torch.Size) -> Tensor:
        stored = torch.from_numpy(np.array(weights.read(name), dtype=np.float32))
        if stored.shape != shape:
            raise ExportError(
                f"--init-layers target: expected {name} of shape {tuple(shape)}, the target's is "
                f"{tuple(stored.shape)}; give --init-layers random"
            )
        return stored

    for index, layer in enumerate(drafter.layers):
        for name, parameter in layer.named_parameters():
            parameter.copy_(read(f"model.layers.{first + index}.{name}", parameter.shape))
    # Context rows are no further normed: hidden_norm stands for the layers' own norm of the residual stream.
    size = drafter.spec.decoder.hidden_size
    drafter.fc.weight.mul_(_QUIET_FEATURES)
    root = 1.0 / drafter.feature_scale[-size:]
    # The norm behind it takes any size: one that a learning rate suits.
    drafter.fc.weight[:, -size:] = torch.diag(root / root.median())
    last = f"model.layers.{first + len(drafter.layers) - 1}.input_layernorm.weight"
    drafter.hidden_norm.weight.copy_(read(last, drafter.hidden_norm.weight.shape))
