"""DeepSeek-V4, as ``transformers`` defines it; configs in its spelling and in that of the released checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_export.decoder import Attention, Rope, RopeScaling
from dspark_export.deepseek_v4 import Compression, DeepSeekV4, Experts, HyperConnections, Indexer
from dspark_export.families import yarn
from dspark_export.families.common import require

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}
"""compress_ratios of released configs."""


def describe(config: Mapping[str, Any]) -> DeepSeekV4:
    """The decoder of a config.json; what it leaves out has the value that ``transformers`` gives it.

    Raises:
        ValueError: a value that the graph does not reproduce.
    """
    require(config, "hidden_act", "silu", missing="silu")
    require(config, "scoring_func", "sqrtsoftplus", missing="sqrtsoftplus")
    require(config, "norm_topk_prob", True, missing=True)
    require(config, "num_key_value_heads", 1, missing=1)
    require(config, "n_shared_experts", 1, missing=1)
    require(config, "attention_bias", False)
    require(config, "mlp_bias", False)
    count, head_dim = int(config["num_hidden_layers"]), int(config["head_dim"])
    rope_dim = int(head_dim * _rotated(config, head_dim))
    plain, compressed = _ropes(config, head_dim, rope_dim)
    kinds = _layer_kinds(config, count)
    rates = {SPARSE: 4, HEAVY: 128} | dict(config.get("compress_rates") or {})
    rates[SPARSE] = config.get("compress_rate_csa") or rates[SPARSE]
    rates[HEAVY] = config.get("compress_rate_hca") or rates[HEAVY]
    indexer = Indexer(config["index_n_heads"], config["index_head_dim"], config["index_topk"])
    compressions = {
        SLIDING: None,
        SPARSE: Compression(int(rates[SPARSE]), indexer),
        HEAVY: Compression(int(rates[HEAVY]), None),
    }
    return DeepSeekV4(
        family="deepseek_v4",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["moe_intermediate_size"],
        num_layers=count,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        attention=Attention(config["num_attention_heads"], 1, head_dim, plain, window=int(config["sliding_window"])),
        tied_embedding=bool(config.get("tie_word_embeddings", False)),
        max_position=config["max_position_embeddings"],
        query_rank=config["q_lora_rank"],
        rope_dim=rope_dim,
        compressed_rope=compressed,
        output_groups=config["o_groups"],
        output_rank=config["o_lora_rank"],
        compressions=tuple(compressions[kind] for kind in kinds),
        hash_routed=_hash_routed(config, count),
        experts=Experts(
            count=config["n_routed_experts"],
            chosen=config["num_experts_per_tok"],
            scale=float(config.get("routed_scaling_factor", 1.5)),
            limit=float(config.get("swiglu_limit", 10.0)),
        ),
        hyper=HyperConnections(
            config.get("hc_mult", 4), config.get("hc_sinkhorn_iters", 20), float(config.get("hc_eps", 1e-6))
        ),
        drafter_taps=tuple(config.get("dspark_target_layer_ids") or ()),
    )


def _rotated(config: Mapping[str, Any], head_dim: int) -> float:
    """The share of a head's channels that is rotated."""
    if config.get("partial_rotary_factor") is not None:
        return float(config["partial_rotary_factor"])
    if config.get("qk_rope_head_dim") is not None:
        return float(config["qk_rope_head_dim"] / head_dim)
    return 64 / 512


def _layer_kinds(config: Mapping[str, Any], count: int) -> list[str]:
    kinds = config.get("layer_types")
    ratios = config.get("compress_ratios")
    if kinds is None and ratios is not None:
        # Longer than the layers where it names the drafter's, too.
        if unknown := sorted(set(ratios[:count]) - set(_RATIOS)):
            raise ValueError(f"compress_ratios: expected 0, 4 or 128, got {', '.join(map(str, unknown))}")
        kinds = [_RATIOS[ratio] for ratio in ratios]
    if kinds is None:
        kinds = [HEAVY] * min(count, 2) + [SPARSE if layer % 2 else HEAVY for layer in range(max(count - 2, 0))]
    if unknown := sorted(set(kinds) - {SLIDING, SPARSE, HEAVY}):
        raise ValueError(f"layer_types: expected {SLIDING}, {SPARSE} or {HEAVY}, got {', '.join(map(str, unknown))}")
    return list(kinds[:count])


def _hash_routed(config: Mapping[str, Any], count: int) -> tuple[bool, ...]:
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        first = config.get("num_hash_layers")
        return tuple(layer < (3 if first is None else first) for layer in range(count))
    if unknown := sorted(set(kinds) - {"hash_moe", "moe"}):
        raise ValueError(f"mlp_layer_types: expected hash_moe or moe, got {', '.join(map(str, unknown))}")
    return tuple(kind == "hash_moe" for kind in kinds[:count])


def _ropes(config: Mapping[str, Any], head_dim: int, rope_dim: int) -> tuple[Rope, Rope]:
    """(that of sliding layers, that of layers with compression)"""
    stated = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    main, compress = stated.get("main"), stated.get("compress")
    if not isinstance(main, Mapping) or not isinstance(compress, Mapping):
        main = {"rope_theta": config.get("rope_theta", 10_000.0)}
        # Released models do not scale cosines and sines, though YaRN would.
        compress = {"attention_factor": 1.0} | {k: v for k, v in stated.items() if k not in ("main", "compress")}
        compress["rope_theta"] = config.get("compress_rope_theta", 160_000.0)
    for parameters in (main, compress):
        share = parameters.get("partial_rotary_factor")
        if share is not None and int(head_dim * share) != rope_dim:
            raise ValueError(f"rope_parameters: partial_rotary_factor: expected {rope_dim / head_dim}, got {share}")
    return _rope(main, rope_dim), _rope(compress, rope_dim)


def _rope(parameters: Mapping[str, Any], dim: int) -> Rope:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    plain = Rope(dim, float(parameters["rope_theta"]))
    if kind == "default":
        return plain
    if kind != "yarn":
        raise ValueError(f"rope_type: expected default or yarn, got {kind!r}")
    if parameters.get("attention_factor") != 1.0:
        raise ValueError(f"rope_parameters: attention_factor: expected 1.0, got {parameters.get('attention_factor')}")
    original = int(parameters["original_max_position_embeddings"])
    return Rope(dim, plain.theta, RopeScaling("factors", divisors=yarn.divisors(parameters, plain, original)))
