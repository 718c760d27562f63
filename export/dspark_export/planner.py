"""What a model, a drafter and a GPU come to, from config.json alone: memory, disk, slots, engine profiles.

Sizes are those of what this package writes, before anything is written: the tables of RoPE and the graphs themselves
(below a few MiB) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dspark_backend.stages.engine_contract import Workload
from dspark_export.decoder import Decoder
from dspark_export.deepseek_v4 import DeepSeekV4
from dspark_export.drafter_spec import DrafterSpec
from dspark_export.errors import ExportError
from dspark_export.gpus import Gpu, check_capability
from dspark_export.parameters import Matrix, ParameterCount, context_matrices, count_drafter, count_target
from dspark_export.quantization.int4 import INT4_BLOCK, fits_int4
from dspark_export.tensorrt_graphs import TENSORRT_DTYPES

Precision = Literal["float32", "float16", "bfloat16", "int8", "fp8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16", "int8", "fp8", "int4")

CHECKPOINT_BYTES = 2
"""Released checkpoints are bfloat16."""
PREFILL_TOKENS = 512
RESERVED = 0.08
"""Share of a GPU's memory that the driver, the libraries and fragmentation take."""


@dataclass(frozen=True)
class _Storage:
    """Bytes a number of each kind."""

    table: int
    """Embedding, LM head, and whatever a precision leaves as it is."""
    cache: int
    """Keys and values."""


_STORAGE: dict[Precision, _Storage] = {
    "float32": _Storage(4, 4),
    "float16": _Storage(2, 2),
    "bfloat16": _Storage(2, 2),
    # Of the CPU runtime: its head is int8 too, with a bfloat16 copy for the drafter, and the rest float32.
    "int8": _Storage(4, 4),
    "fp8": _Storage(2, 2),
    "int4": _Storage(2, 2),
}


@dataclass(frozen=True)
class ModelSize:
    """One of the two models."""

    parameters: int
    weight_bytes: dict[str, int]
    """By precision: what its weights take in memory."""
    cache_bytes_per_token: int
    """Keys and values of one position, in the planned precision."""
    download_bytes: int
    artifact_bytes: int
    engine_bytes: int
    """The directory with TensorRT engines holds all weights once more: its embedding and LM head are a copy. 0 for a
    precision without engines."""


@dataclass(frozen=True)
class ProfilePlan:
    """An optimization profile to build: tokens of a step, least, most often, at most."""

    engine: str
    name: str
    low: int
    best: int
    high: int


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a build."""

    family: str
    precision: Precision
    context: int
    target: ModelSize
    drafter: ModelSize | None
    workspace_bytes: int
    """Activations, attention scores of a prefill step, and logits, in the largest step."""
    gpu: str | None
    gpu_bytes: int | None
    slots: int | None
    """Sequences of ``context`` positions, and the padding of their caches, that fit beside the weights; None without a
    GPU."""
    profiles: tuple[ProfilePlan, ...]

    @property
    def disk_bytes(self) -> int:
        """Downloads, artifacts and engines together."""
        models = [self.target] + ([self.drafter] if self.drafter else [])
        return sum(model.download_bytes + model.artifact_bytes + model.engine_bytes for model in models)

    @property
    def cache_bytes_per_token(self) -> int:
        """Target and drafter together."""
        return self.target.cache_bytes_per_token + (self.drafter.cache_bytes_per_token if self.drafter else 0)


def matrix_bytes(matrix: Matrix, precision: Precision) -> int:
    """Bytes of a product's weights and their scales. What a precision does not reach keeps the compute dtype: in fp8
    products that read no norm, in int4 those whose blocks of input channels are not full."""
    table, size = _STORAGE[precision].table, matrix.size
    if matrix.reads == "table":
        return size * table
    if precision == "int8":
        return size + 4 * matrix.width
    if precision == "fp8" and matrix.reads == "norm":
        return size + table * matrix.width
    if precision == "int4" and fits_int4(matrix.inner, matrix.width):
        return size // 2 + table * size // INT4_BLOCK
    return size * table


def weight_bytes(count: ParameterCount, precision: Precision, shared: bool = False) -> int:
    """Bytes of a model's weights in memory. ``shared``: embedding and head are another model's (a drafter's are)."""
    table = _STORAGE[precision].table
    inside = sum(matrix_bytes(matrix, precision) for matrix in count.matrices) + count.other * table
    if shared:
        return inside
    if precision == "int8":
        # A head product in int8 and, unless the embedding serves, the drafter's copy of it in bfloat16.
        return inside + 4 * count.embedding + count.head * (1 if count.tied else 3)
    return inside + table * (count.embedding + (0 if count.tied else count.head))


def cache_bytes_per_token(decoder: Decoder, precision: Precision) -> int:
    """Bytes of keys and values of one position over all layers. Sliding layers keep every row as well."""
    width = sum(heads * channels for heads, channels in decoder.cache_shapes)
    return 2 * width * _STORAGE[precision].cache


def plan(decoder: Decoder, drafter: DrafterSpec | None, precision: Precision, context: int, gpu: Gpu | None) -> Plan:
    """The plan for a target, its drafter, a precision, sequences of ``context`` positions, and a GPU.

    Raises:
        ExportError: the drafter is of another target, the context is longer than the model's, or the GPU cannot
            compute in the precision.
    """
    _check(decoder, drafter, precision, context, gpu)
    draft_size = None if drafter is None else drafter_size(drafter, precision)
    target_size = _target_size(decoder, precision)
    block = drafter.block_size if drafter else 0
    positions = Workload(context, 1, block, PREFILL_TOKENS).capacity
    most = 64 if gpu is None else max(1, _fitting(gpu, precision, target_size, draft_size, 0, positions))
    workspace = _workspace(decoder, precision, context, min(most, 64) * (1 + block))
    slots = None if gpu is None else _fitting(gpu, precision, target_size, draft_size, workspace, positions)
    return Plan(
        family=decoder.family,
        precision=precision,
        context=context,
        target=target_size,
        drafter=draft_size,
        workspace_bytes=workspace,
        gpu=gpu.name if gpu else None,
        gpu_bytes=gpu.memory if gpu else None,
        slots=slots,
        profiles=profiles(block, Workload.slots if slots is None else slots, context),
    )


def profiles(block: int, slots: int, context: int) -> tuple[ProfilePlan, ...]:
    """The profiles that the engines are built with, by tokens (verifier) or context rows (drafter) of a step."""
    work = Workload(context, max(1, slots), block, PREFILL_TOKENS)
    engines = [("verifier", "B", work.verifier_profiles())]
    if block:
        engines += [("draft", "M", work.draft_profiles()), ("context", "M", work.context_profiles())]
    return tuple(
        ProfilePlan(engine, profile.name, counted.low, counted.best, counted.high)
        for engine, symbol, proposed in engines
        for profile in proposed
        for counted in (profile.ranges[symbol],)
    )


def _check(decoder: Decoder, drafter: DrafterSpec | None, precision: Precision, context: int, gpu: Gpu | None) -> None:
    _check_planned(decoder)
    if precision not in PRECISIONS:
        raise ExportError(f"--dtype: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not 2 <= context <= decoder.max_position:
        raise ExportError(f"--context: expected 2 to the model's {decoder.max_position}, got {context}")
    if gpu is not None and gpu.compute_capability is not None:
        check_capability("--gpu", precision, f"{gpu.name} (SM{gpu.compute_capability})", gpu.compute_capability)
    if drafter is None:
        return
    for what, own, other in (
        ("vocab_size", drafter.decoder.vocab_size, decoder.vocab_size),
        ("hidden_size", drafter.decoder.hidden_size, decoder.hidden_size),
    ):
        if own != other:
            raise ExportError(f"--drafter: it has {what} {own}, the model {other}; use the drafter made for this model")
    if max(drafter.target_layer_ids) > decoder.num_layers - 2:
        raise ExportError(
            f"--drafter: it reads layers {list(drafter.target_layer_ids)}, the model has 0 to "
            f"{decoder.num_layers - 1}, the last not to be read; use the drafter made for this model"
        )


def _check_planned(decoder: Decoder) -> None:
    if isinstance(decoder, DeepSeekV4):
        raise ExportError("model_type deepseek_v4: its sizes are not planned; export it without --dry-run")


def _target_size(decoder: Decoder, precision: Precision) -> ModelSize:
    count = count_target(decoder)
    held = weight_bytes(count, precision)
    return ModelSize(
        parameters=count.total,
        weight_bytes={name: weight_bytes(count, name) for name in PRECISIONS},
        cache_bytes_per_token=cache_bytes_per_token(decoder, precision),
        download_bytes=count.total * CHECKPOINT_BYTES,
        artifact_bytes=held,
        engine_bytes=held if precision in TENSORRT_DTYPES else 0,
    )


def drafter_size(spec: DrafterSpec, precision: Precision) -> ModelSize:
    """Sizes of a drafter, whose embedding and head are its verifier's. Raises ExportError for one of DeepSeek-V4."""
    _check_planned(spec.decoder)
    count = count_drafter(spec)
    stored = {name: weight_bytes(count, name, shared=True) + _context_copy(spec, name) for name in PRECISIONS}
    return ModelSize(
        parameters=count.total,
        weight_bytes={name: size + _own_head(spec, name) for name, size in stored.items()},
        cache_bytes_per_token=cache_bytes_per_token(spec.decoder, precision),
        download_bytes=count.total * CHECKPOINT_BYTES,
        artifact_bytes=stored[precision],
        engine_bytes=stored[precision] if precision in TENSORRT_DTYPES else 0,
    )


def _context_copy(spec: DrafterSpec, precision: Precision) -> int:
    """Both graphs project the context's keys and values by a product of their own, and both have fc."""
    features, context = (matrix_bytes(matrix, precision) for matrix in context_matrices(spec))
    return features + 2 * context


def _own_head(spec: DrafterSpec, precision: Precision) -> int:
    """A reduced vocabulary's rows of the head, copied at load; in int8 every drafter has a head of its own."""
    size = spec.draft_vocab_size * spec.decoder.hidden_size
    if precision == "int8":
        return size
    return size * _STORAGE[precision].table if spec.draft_vocab_size != spec.decoder.vocab_size else 0


def _workspace(decoder: Decoder, precision: Precision, context: int, logit_rows: int) -> int:
    attention = decoder.attention
    width = 4 * decoder.hidden_size + 3 * decoder.intermediate_size
    width += (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim
    width += 2 * attention.num_heads * context  # scores and their softmax
    return PREFILL_TOKENS * width * _STORAGE[precision].cache + 2 * logit_rows * decoder.vocab_size * 4


def _fitting(
    gpu: Gpu, precision: Precision, target: ModelSize, drafter: ModelSize | None, workspace: int, positions: int
) -> int:
    free = gpu.memory * (1 - RESERVED) - workspace - target.weight_bytes[precision]
    token = target.cache_bytes_per_token
    if drafter is not None:
        free -= drafter.weight_bytes[precision]
        token += drafter.cache_bytes_per_token
    return max(0, int(free // (token * positions)))
