"""Drafters inside DeepSeek-V4 checkpoints (``DeepSeek-V4-Flash-DSpark``): ``mtp.*`` tensors and ``dspark_*`` keys.

The layout is read and checked; its graph is not built, and ``refuse`` says so. As ``vllm/models/deepseek_v4/nvidia/
dspark.py`` and ``speculators/models/dsv4_dspark`` describe it:

- Stage i is a DeepSeek-V4 decoder layer ``mtp.<i>`` of compress ratio 0: attention with one shared key/value row a
  position (``wkv``), low-rank queries (``wq_a``, ``wq_b``) and outputs (``wo_a`` in ``o_groups`` groups, ``wo_b``), a
  sink a head, a sliding window; a mixture of experts; hyper-connections (``hc_attn_*``, ``hc_ffn_*``) over ``hc_mult``
  residual streams.
- ``mtp.0.main_proj`` and ``main_norm`` make the context row of a position out of the target's features: the *mean over
  the residual streams* behind each layer of ``dspark_target_layer_ids`` (the last ones, unlike elsewhere).
- The last stage holds what is behind the backbone: ``hc_head_*`` joins the streams, ``norm``, a vanilla ``markov_head``
  of ``dspark_markov_rank``, and ``confidence_head`` without a bias.
- Slots without a token take ``dspark_noise_token_id``. Embedding and LM head are the target's.
- Released files are quantised: block FP8 with ``.scale`` beside ``.weight``, experts FP4, two to a byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from dspark_export.errors import ExportError
from dspark_export.weights import WeightSource

_STAGE = re.compile(r"mtp\.(\d+)\.")


@dataclass(frozen=True)
class DeepSeekDraft:
    """The drafter of a DeepSeek-V4 checkpoint."""

    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    noise_token_id: int
    markov_rank: int
    num_stages: int
    sliding_window: int
    vocab_size: int
    hidden_size: int
    streams: int
    """Residual streams of the hyper-connections."""
    num_heads: int
    head_dim: int
    query_rank: int
    output_rank: int
    output_groups: int
    num_experts: int
    expert_size: int
    confidence: bool
    expert_dtype: str

    def __post_init__(self) -> None:
        """Raises ExportError for values that no checkpoint of this layout has."""
        if not 1 <= self.block_size <= 64:
            raise ExportError(f"dspark_block_size: expected 1 to 64, got {self.block_size}")
        layers = self.target_layer_ids
        if not layers or any(not 0 <= layer < self.num_target_layers for layer in layers):
            raise ExportError(
                f"dspark_target_layer_ids: expected layers from 0 to {self.num_target_layers - 1}, got {list(layers)}; "
                "the drafter is of another target"
            )
        if not 0 <= self.noise_token_id < self.vocab_size:
            raise ExportError(
                f"dspark_noise_token_id: expected a token below {self.vocab_size}, got {self.noise_token_id}; "
                "the drafter is of another target"
            )


def recognise(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a DeepSeek-V4 target with its drafter inside."""
    return "dspark_target_layer_ids" in config or (
        str(config.get("model_type", "")).startswith("deepseek_v4") and any(key.startswith("dspark_") for key in config)
    )


def describe(config: Mapping[str, Any]) -> DeepSeekDraft:
    """The drafter that config.json describes. Raises ExportError for a missing key or an impossible value."""
    try:
        return DeepSeekDraft(
            block_size=config["dspark_block_size"],
            target_layer_ids=tuple(config["dspark_target_layer_ids"]),
            num_target_layers=config["num_hidden_layers"],
            noise_token_id=config["dspark_noise_token_id"],
            markov_rank=config["dspark_markov_rank"],
            num_stages=config.get("n_mtp_layers") or 3,
            sliding_window=config["sliding_window"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            streams=config["hc_mult"],
            num_heads=config["num_attention_heads"],
            head_dim=config["head_dim"],
            query_rank=config["q_lora_rank"],
            output_rank=config["o_lora_rank"],
            output_groups=config["o_groups"],
            num_experts=config.get("dspark_n_routed_experts") or config["n_routed_experts"],
            expert_size=config["moe_intermediate_size"],
            confidence=bool(config.get("enable_confidence_head", True)),
            expert_dtype=str(config.get("expert_dtype", "fp4")),
        )
    except KeyError as missing:
        raise ExportError(f"DeepSeek-V4 drafter, config.json: expected the key {missing}") from missing


def expected_shapes(draft: DeepSeekDraft) -> dict[str, tuple[int, ...]]:
    """Every tensor of the drafter in its unquantised shape."""
    hidden, streams, heads = draft.hidden_size, draft.streams, draft.num_heads * draft.head_dim
    mixes = (2 + streams) * streams
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.0.main_proj.weight": (hidden, hidden * len(draft.target_layer_ids)),
        "mtp.0.main_norm.weight": (hidden,),
    }
    for stage in range(draft.num_stages):
        prefix = f"mtp.{stage}"
        shapes |= {
            f"{prefix}.attn_norm.weight": (hidden,),
            f"{prefix}.ffn_norm.weight": (hidden,),
            f"{prefix}.attn.wq_a.weight": (draft.query_rank, hidden),
            f"{prefix}.attn.q_norm.weight": (draft.query_rank,),
            f"{prefix}.attn.wq_b.weight": (heads, draft.query_rank),
            f"{prefix}.attn.wkv.weight": (draft.head_dim, hidden),
            f"{prefix}.attn.kv_norm.weight": (draft.head_dim,),
            f"{prefix}.attn.wo_a.weight": (draft.output_groups * draft.output_rank, heads // draft.output_groups),
            f"{prefix}.attn.wo_b.weight": (hidden, draft.output_groups * draft.output_rank),
            f"{prefix}.attn.attn_sink": (draft.num_heads,),
            f"{prefix}.ffn.gate.weight": (draft.num_experts, hidden),
            f"{prefix}.ffn.gate.bias": (draft.num_experts,),
        }
        for part in ("attn", "ffn"):
            shapes |= {
                f"{prefix}.hc_{part}_fn": (mixes, streams * hidden),
                f"{prefix}.hc_{part}_base": (mixes,),
                f"{prefix}.hc_{part}_scale": (3,),
            }
        for expert in ["shared_experts", *(f"experts.{index}" for index in range(draft.num_experts))]:
            shapes |= {
                f"{prefix}.ffn.{expert}.w1.weight": (draft.expert_size, hidden),
                f"{prefix}.ffn.{expert}.w2.weight": (hidden, draft.expert_size),
                f"{prefix}.ffn.{expert}.w3.weight": (draft.expert_size, hidden),
            }
    last = f"mtp.{draft.num_stages - 1}"
    shapes |= {
        f"{last}.norm.weight": (hidden,),
        f"{last}.hc_head_fn": (streams, streams * hidden),
        f"{last}.hc_head_base": (streams,),
        f"{last}.hc_head_scale": (1,),
        f"{last}.markov_head.markov_w1.weight": (draft.vocab_size, draft.markov_rank),
        f"{last}.markov_head.markov_w2.weight": (draft.vocab_size, draft.markov_rank),
    }
    if draft.confidence:
        shapes[f"{last}.confidence_head.proj.weight"] = (1, hidden + draft.markov_rank)
    return shapes


def check(draft: DeepSeekDraft, weights: WeightSource) -> None:
    """Make sure that the drafter in a checkpoint is whole. Reads headers alone.

    Raises:
        ExportError: a tensor is missing or has another shape, or there are other stages than config.json says.
    """
    stages = {int(found[1]) for name in weights.names() if (found := _STAGE.match(name))}
    if stages != set(range(draft.num_stages)):
        raise ExportError(
            f"DeepSeek-V4 drafter: expected the stages mtp.0 to mtp.{draft.num_stages - 1}, got "
            f"{sorted(stages) or 'none'}"
        )
    for name, shape in expected_shapes(draft).items():
        got = weights.shape(name)
        packed = (*shape[:-1], shape[-1] // 2)
        fp4 = ".experts." in name and draft.expert_dtype == "fp4"
        if got != shape and not (fp4 and got == packed):
            raise ExportError(f"DeepSeek-V4 drafter: expected {name} of shape {shape}, got {got}")


def refuse(draft: DeepSeekDraft) -> NoReturn:
    """Say what was recognised and what is not supported. Raises ExportError."""
    raise ExportError(
        f"recognised the drafter of a DeepSeek-V4 checkpoint (mtp.0 to mtp.{draft.num_stages - 1}, block "
        f"{draft.block_size}, target layers {', '.join(map(str, draft.target_layer_ids))}, sliding window "
        f"{draft.sliding_window}); its backbone of sliding-window attention with shared key/value rows, "
        f"{draft.num_experts} experts and {draft.streams} residual streams is not supported: drafters of Qwen3, "
        "Gemma 4 and Llama targets are"
    )
