"""Drafters inside DeepSeek-V4 checkpoints (``DeepSeek-V4-Flash-DSpark``): ``mtp.*`` tensors and ``dspark_*`` keys.

As ``vllm/models/deepseek_v4/nvidia/dspark.py`` and ``speculators/models/dsv4_dspark`` describe it:

- Stage i is a DeepSeek-V4 decoder layer ``mtp.<i>`` of compress ratio 0: attention with one shared key/value row a
  position (``wkv``), low-rank queries (``wq_a``, ``wq_b``) and outputs (``wo_a`` in ``o_groups`` groups, ``wo_b``), a
  sink a head, a sliding window; a mixture of experts; hyper-connections (``hc_attn_*``, ``hc_ffn_*``) over ``hc_mult``
  residual streams.
- There are ``n_mtp_layers`` stages, 3 where config.json does not say (its ``num_nextn_predict_layers`` is another
  number).
- ``mtp.0.main_proj`` and ``main_norm`` make the context row of a position out of the target's features: the *mean over
  the residual streams* behind each layer of ``dspark_target_layer_ids`` (the last ones, unlike elsewhere).
- The last stage holds what is behind the backbone: ``hc_head_*`` joins the streams, ``norm``, a vanilla ``markov_head``
  of ``dspark_markov_rank``, and ``confidence_head`` without a bias.
- Slots without a token take ``dspark_noise_token_id``. Embedding and LM head are the target's.
- Released files are quantised: block FP8 with ``.scale`` beside ``.weight``, experts FP4, two to a byte. Those are
  refused: dequantise them first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark_export.deepseek_v4 import DeepSeekV4
from dspark_export.drafter_spec import DrafterSpec
from dspark_export.errors import ExportError
from dspark_export.families import describe as describe_target
from dspark_export.weights import WeightSource
from dspark_export.weights.wrapped import WrappedWeights

_STAGE = re.compile(r"mtp\.(\d+)\.")
_BEHIND = ("norm.", "hc_head_", "markov_head.", "confidence_head.")
"""How names in the last stage begin that are of no layer."""
_EMBEDDING = "embed_tokens.weight"
_ENTRY = {"mtp.0.main_proj.weight": "fc.weight", "mtp.0.main_norm.weight": "hidden_norm.weight"}


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a DeepSeek-V4 target with its drafter inside."""
    return "dspark_target_layer_ids" in config or (
        str(config.get("model_type", "")).startswith("deepseek_v4") and any(key.startswith("dspark_") for key in config)
    )


def describe(config: Mapping[str, Any]) -> DrafterSpec:
    """The drafter that config.json describes. Raises ExportError for a missing key or an impossible value."""
    target = describe_target(config)
    if not isinstance(target, DeepSeekV4):
        raise ExportError(
            f"dspark_target_layer_ids: expected in a checkpoint of model_type deepseek_v4, got {target.family}"
        )
    if config.get("dspark_n_routed_experts"):
        raise ExportError(
            "dspark_n_routed_experts: expected none; drafters with other experts than their target's (DeepSeek-V4.1) "
            "are not supported"
        )
    stages = config.get("n_mtp_layers") or 3
    try:
        spec = DrafterSpec(
            decoder=replace(
                target,
                num_layers=stages,
                compressions=(None,) * stages,
                compressed_rope=target.attention.rope,
                hash_routed=(False,) * stages,
                drafter_taps=(),
            ),
            block_size=config["dspark_block_size"],
            target_layer_ids=tuple(config["dspark_target_layer_ids"]),
            mask_token_id=config["dspark_noise_token_id"],
            markov_rank=config["dspark_markov_rank"],
            head="vanilla",
            confidence=bool(config.get("enable_confidence_head", True)),
            confidence_with_markov=True,
            draft_vocab_size=target.vocab_size,
            confidence_bias=False,
        )
    except KeyError as missing:
        raise ExportError(f"DeepSeek-V4 drafter, config.json: expected the key {missing}") from missing
    _check_values(spec, target.num_layers)
    return spec


def _check_values(spec: DrafterSpec, num_target_layers: int) -> None:
    if not 1 <= spec.block_size <= 64:
        raise ExportError(f"dspark_block_size: expected 1 to 64, got {spec.block_size}")
    layers = spec.target_layer_ids
    if not layers or any(not 0 <= layer < num_target_layers for layer in layers):
        raise ExportError(
            f"dspark_target_layer_ids: expected layers from 0 to {num_target_layers - 1}, got {list(layers)}; "
            "the drafter is of another target"
        )
    if not 0 <= spec.mask_token_id < spec.draft_vocab_size:
        raise ExportError(
            f"dspark_noise_token_id: expected a token below {spec.draft_vocab_size}, got {spec.mask_token_id}; "
            "the drafter is of another target"
        )


def expected_shapes(spec: DrafterSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the drafter as released, in its unquantised shape."""
    decoder = spec.decoder
    assert isinstance(decoder, DeepSeekV4)
    hidden, inner, streams = decoder.hidden_size, decoder.intermediate_size, decoder.hyper.streams
    dim, groups, rank = decoder.attention.head_dim, decoder.output_groups, decoder.query_rank
    heads, low, experts = decoder.attention.num_heads * dim, groups * decoder.output_rank, decoder.experts.count
    mixes = (2 + streams) * streams
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.0.main_proj.weight": (hidden, spec.feature_size),
        "mtp.0.main_norm.weight": (hidden,),
    }
    for stage in range(decoder.num_layers):
        prefix = f"mtp.{stage}"
        shapes |= {
            f"{prefix}.attn_norm.weight": (hidden,),
            f"{prefix}.ffn_norm.weight": (hidden,),
            f"{prefix}.attn.wq_a.weight": (rank, hidden),
            f"{prefix}.attn.q_norm.weight": (rank,),
            f"{prefix}.attn.wq_b.weight": (heads, rank),
            f"{prefix}.attn.wkv.weight": (dim, hidden),
            f"{prefix}.attn.kv_norm.weight": (dim,),
            f"{prefix}.attn.wo_a.weight": (low, heads // groups),
            f"{prefix}.attn.wo_b.weight": (hidden, low),
            f"{prefix}.attn.attn_sink": (decoder.attention.num_heads,),
            f"{prefix}.ffn.gate.weight": (experts, hidden),
            f"{prefix}.ffn.gate.bias": (experts,),
        }
        for part in ("attn", "ffn"):
            shapes |= {
                f"{prefix}.hc_{part}_fn": (mixes, streams * hidden),
                f"{prefix}.hc_{part}_base": (mixes,),
                f"{prefix}.hc_{part}_scale": (3,),
            }
        for expert in ["shared_experts", *(f"experts.{index}" for index in range(experts))]:
            shapes |= {
                f"{prefix}.ffn.{expert}.w1.weight": (inner, hidden),
                f"{prefix}.ffn.{expert}.w2.weight": (hidden, inner),
                f"{prefix}.ffn.{expert}.w3.weight": (inner, hidden),
            }
    last = f"mtp.{decoder.num_layers - 1}"
    shapes |= {
        f"{last}.norm.weight": (hidden,),
        f"{last}.hc_head_fn": (streams, streams * hidden),
        f"{last}.hc_head_base": (streams,),
        f"{last}.hc_head_scale": (1,),
        f"{last}.markov_head.markov_w1.weight": (decoder.vocab_size, spec.markov_rank),
        f"{last}.markov_head.markov_w2.weight": (decoder.vocab_size, spec.markov_rank),
    }
    if spec.confidence:
        shapes[f"{last}.confidence_head.proj.weight"] = (1, hidden + spec.markov_rank)
    return shapes


def check(spec: DrafterSpec, weights: WeightSource) -> None:
    """Make sure that the drafter in a checkpoint is whole and not quantised. Reads headers alone.

    Raises:
        ExportError: a tensor is missing, has another shape or a scale beside it, or there are other stages than
            config.json says.
    """
    names, count = weights.names(), spec.decoder.num_layers
    stages = {int(found[1]) for name in names if (found := _STAGE.match(name))}
    if stages != set(range(count)):
        raise ExportError(
            f"DeepSeek-V4 drafter: expected the stages mtp.0 to mtp.{count - 1}, got {sorted(stages) or 'none'}"
        )
    for name, shape in expected_shapes(spec).items():
        got = weights.shape(name)
        scale = f"{name.removesuffix('.weight')}.scale"
        if scale in names or (".experts." in name and got == (*shape[:-1], shape[-1] // 2)):
            raise ExportError(
                f"DeepSeek-V4 drafter: expected {name} in float32, float16 or bfloat16, got FP8 or FP4 blocks; "
                "dequantise the checkpoint first"
            )
        if got != shape:
            raise ExportError(f"DeepSeek-V4 drafter: expected {name} of shape {shape}, got {got}")


def rename(spec: DrafterSpec, weights: WeightSource) -> WeightSource:
    """The drafter's tensors as ``layers.<i>...`` of a DeepSeek-V4 decoder, and the rest under the names of released
    drafters; the target's embedding, where the folder has it, as they carry it."""
    last = f"mtp.{spec.decoder.num_layers - 1}."
    stored = {}
    for name in expected_shapes(spec):
        tail = name.removeprefix(last)
        behind = tail != name and tail.startswith(_BEHIND)
        stored[_ENTRY.get(name) or (tail if behind else name.replace("mtp.", "layers.", 1))] = name
    for spelling in ("embed.weight", "model.embed_tokens.weight"):
        if spelling in weights.names():
            stored[_EMBEDDING] = spelling
    return _DrafterNames(weights, stored)


class _DrafterNames(WrappedWeights):
    """A weight source that has some tensors of another, under other names."""

    def __init__(self, source: WeightSource, stored: Mapping[str, str]) -> None:
        super().__init__(source)
        self._stored = stored

    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def _stored_name(self, name: str) -> str:
        return self._stored.get(name, name)
