"""Export of a target model: checkpoint -> graph, tokenizer and stage.json, checked before it says done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dspark_backend.stages.artifact import TensorLocation, VerifierArtifact, save_artifact
from dspark_backend.stages.engine_contract import COMPUTE_DTYPES
from dspark_backend.stages.onnxruntime_verifier import MODEL_FILE
from dspark_export.check import check_verifier
from dspark_export.compare import Comparison, compare_with_transformers, require_transformers
from dspark_export.decoder import Decoder
from dspark_export.deepseek_v4 import DeepSeekV4
from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.gguf_tokenizer import write_tokenizer
from dspark_export.graph.deepseek_v4.verifier import DeepSeekV4Graph
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import EMBEDDING, HEAD, VerifierGraph
from dspark_export.hf_tokenizer import copy_tokenizer, stated_ends
from dspark_export.publish import Progress, file_digests, file_sizes, published, tool_versions
from dspark_export.quantization.calibrate import calibration
from dspark_export.quantization.int4_weights import Int4Weights
from dspark_export.quantization.plan import Int8Plan
from dspark_export.quantization.quality import Quality
from dspark_export.quantization.round_model import rounded_model
from dspark_export.quantization.texts import read_texts
from dspark_export.source import open_weights, resolve_model, source_hash
from dspark_export.target_tensors import check_tensors
from dspark_export.tensorrt_graphs import RUNTIME as TENSORRT
from dspark_export.tensorrt_graphs import check_tensorrt_dtype, write_verifier_graph
from dspark_export.tokenizer_info import TokenizerInfo
from dspark_export.weights import WeightSource, require_unquantised
from dspark_export.weights.finite import FiniteWeights
from dspark_export.weights.gguf_file import GgufFile

STORED = ("float32", "float16", "bfloat16")
"""Float storages; the CPU runtime computes all of them in float32."""
DTYPES = (*STORED, "int8")
GPTQ, NEAREST = "gptq", "nearest"
CALIBRATION_TOKENS = {"int8": 4000, "int4": 12_000}
"""Rounding to 16 levels gains from more text than choosing scales does."""
DEFAULT_MAX_CONTEXT = 8192
HEAD_FILE = "lm_head.bf16"


def check_precision(runtime: str, dtype: str) -> None:
    """Raises ExportError for a runtime or dtype that there is not."""
    if runtime == TENSORRT:
        check_tensorrt_dtype(dtype)
    elif runtime != "onnxruntime":
        raise ExportError(f"--runtime: expected onnxruntime or tensorrt, got {runtime!r}")
    elif dtype not in DTYPES:
        raise ExportError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


@dataclass(frozen=True)
class VerifierExport:
    """What to export and how.

    Raises:
        ExportError: an option has a value that cannot be built.
    """

    model: str
    out: Path
    dtype: str = "float32"
    runtime: str = "onnxruntime"
    target_layer_ids: tuple[int, ...] | None = None
    """None takes the default spread."""
    max_context: int | None = None
    """None takes the model's own, at most DEFAULT_MAX_CONTEXT."""
    calibration_text: Path | None = None
    """For int8 and int4: a prompt file; None takes the dialogues that ship with the package."""
    calibration_tokens: int | None = None
    """None takes CALIBRATION_TOKENS of the dtype."""
    check_tokens: int = 20_000
    """For int8 and int4: tokens of other text over which the result is compared with float32."""
    rounding: str = GPTQ
    """For int4: ``gptq``, or ``nearest``, which needs no calibration and compares nothing."""
    check: bool = True
    """Whether to load the written graph and run a text through it; that takes the model's memory in float32."""
    against_transformers: bool = False
    """Whether to compare its logits with those of ``transformers`` before it is published."""

    def __post_init__(self) -> None:
        check_precision(self.runtime, self.dtype)
        if self.max_context is not None and self.max_context < 2:
            raise ExportError(f"--max-context: expected at least 2, got {self.max_context}")
        if self.rounding not in (GPTQ, NEAREST):
            raise ExportError(f"--rounding: expected {GPTQ} or {NEAREST}, got {self.rounding!r}")
        if self.rounding == NEAREST and self.dtype != "int4":
            raise ExportError(f"--rounding {NEAREST}: expected --dtype int4, got {self.dtype}")
        for option in ("calibration_tokens", "check_tokens"):
            given = getattr(self, option)
            if given is not None and given < 1:
                raise ExportError(f"--{option.replace('_', '-')}: expected at least 1, got {given}")
        reads_text = self.dtype in CALIBRATION_TOKENS and self.rounding == GPTQ
        if self.calibration_text is not None and not reads_text:
            raise ExportError(
                f"--calibration-text: expected --dtype {' or '.join(CALIBRATION_TOKENS)} with --rounding {GPTQ}, got "
                f"{self.dtype} and {self.rounding}, which read no text"
            )


@dataclass(frozen=True)
class ExportedVerifier:
    """What an export did."""

    artifact: VerifierArtifact
    quality: Quality | None
    """Of int8 or int4 against float32."""
    comparison: Comparison | None = None
    """With transformers, where that was wanted."""


def export_verifier(options: VerifierExport, progress: Progress) -> ExportedVerifier:
    """Write the artifact into ``options.out``; nothing changes there unless everything succeeded.

    Raises:
        ExportError: the checkpoint is incomplete or of a kind we cannot build, or the graph fails a check.
    """
    path = resolve_model(options.model)
    if options.against_transformers:
        require_transformers()
    weights = open_weights(path)
    decoder = describe(weights.config)
    if isinstance(decoder, DeepSeekV4):
        check_deepseek(options.runtime, options.dtype)
    require_unquantised(weights.config, f"model {path.name}")
    if not isinstance(decoder, DeepSeekV4):
        check_tensors(decoder, weights, path.name)
    taps = taps_of(decoder, options.target_layer_ids)
    max_context = min(decoder.max_position, options.max_context or DEFAULT_MAX_CONTEXT)
    if options.max_context and options.max_context > decoder.max_position:
        raise ExportError(
            f"--max-context: expected at most the model's {decoder.max_position}, got {options.max_context}"
        )
    progress("hash the checkpoint", 0.0)
    digest = source_hash(weights.files)
    with published(options.out) as work:
        tokenizer = _write_tokenizer(path, weights, work) or _without_tokenizer(path, weights)
        weights = FiniteWeights(weights, options.dtype)
        writer = _Writer(options, decoder, weights, taps, max_context, tokenizer, (path.name, digest), work, progress)
        exported = writer.export()
        if options.against_transformers:
            exported = replace(exported, comparison=compare_with_transformers(path, work))
        return exported


@dataclass(frozen=True)
class _Writer:
    """Writes graph and stage.json into a scratch folder, and checks them."""

    options: VerifierExport
    decoder: Decoder
    weights: WeightSource
    taps: tuple[int, ...]
    max_context: int
    tokenizer: TokenizerInfo
    source: tuple[str, str]
    """Name and hash."""
    work: Path
    progress: Progress

    def export(self) -> ExportedVerifier:
        """All files, and how good they are where something was rounded."""
        options = self.options
        if options.dtype != "int8" and (options.dtype != "int4" or options.rounding == NEAREST):
            return ExportedVerifier(self.write(), None)
        texts = read_texts(
            options.calibration_text, self.work, self.tokenizer, self.decoder.vocab_size,
            options.calibration_tokens or CALIBRATION_TOKENS[options.dtype], options.check_tokens, self.max_context,
        )  # fmt: skip
        if options.dtype == "int4":
            compute = COMPUTE_DTYPES[options.dtype]
            with rounded_model(self.decoder, self.weights, texts, compute, options.out, self.progress) as rounded:
                return ExportedVerifier(self.write(rounded=rounded.weights), rounded.quality)
        with calibration(self.decoder, self.weights, texts, options.out, self.progress) as calibrated:
            artifact = self.write(calibrated.plan(self.progress))
            return ExportedVerifier(artifact, calibrated.quality(self.work, self.progress))

    def write(self, plan: Int8Plan | None = None, rounded: Int4Weights | None = None) -> VerifierArtifact:
        decoder, tokenizer, dtype = self.decoder, self.tokenizer, self.options.dtype
        engine = None
        if self.options.runtime == TENSORRT:
            embedding, head, engine = write_verifier_graph(
                decoder, self.weights, self.taps, self.max_context, dtype, self.work,
                lambda done: self.progress("write weights", done), rounded,
            )  # fmt: skip
        else:
            locations = save_graph(
                self._graph(plan), self.work, MODEL_FILE, lambda done: self.progress("write weights", done)
            )
            embedding = locations[f"{EMBEDDING}.weight"]
            head = embedding if decoder.tied_embedding else self._head(locations)
        artifact = VerifierArtifact(
            family=decoder.family,
            runtime=self.options.runtime,
            dtype=dtype,
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            num_layers=decoder.num_layers,
            num_heads=decoder.attention.num_heads,
            num_kv_heads=decoder.attention.num_kv_heads,
            head_dim=decoder.attention.head_dim,
            layer_caches=decoder.cache_shapes,
            max_context=self.max_context,
            target_layer_ids=self.taps,
            embedding=embedding,
            head=head,
            eos_token_ids=tuple(tokenizer.eos_token_ids),
            bos_token_id=tokenizer.bos_token_id,
            add_bos=tokenizer.add_bos,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            chat_template=tokenizer.chat_template,
            source=self.source[0],
            source_hash=self.source[1],
            tool_versions=tool_versions(),
            files=file_sizes(self.work),
            digests=file_digests(self.work),
            engine=engine,
        )
        save_artifact(artifact, self.work)
        if self.options.check and engine is None:
            self.progress("check the written graph", 0.0)
            check_verifier(self.work)
        return artifact

    def _graph(self, plan: Int8Plan | None) -> ir.Model:
        decoder, weights, dtype = self.decoder, self.weights, self.options.dtype
        if isinstance(decoder, DeepSeekV4):
            return DeepSeekV4Graph(decoder, weights, self.taps, self.max_context, dtype).build()
        return VerifierGraph(decoder, weights, self.taps, self.max_context, "float32" if plan else dtype, plan).build()

    def _head(self, locations: Mapping[str, TensorLocation]) -> TensorLocation:
        """The LM head that a drafter shares. An int8 graph has it in another form, so that it is stored once more."""
        name = f"{HEAD}.weight"
        if name in locations:
            return locations[name]
        head = self.weights.read(name).astype(np.float32)
        # The upper half of a float32, rounded, is a bfloat16.
        halves = ((head.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
        halves.tofile(self.work / HEAD_FILE)
        return TensorLocation(HEAD_FILE, 0, head.shape, "bfloat16")


def check_deepseek(runtime: str, dtype: str) -> None:
    """Raises ExportError for options that no graph of DeepSeek-V4, verifier or drafter, is built for."""
    if runtime == TENSORRT or dtype not in STORED:
        raise ExportError(
            f"model_type deepseek_v4: expected --runtime onnxruntime and --dtype {', '.join(STORED)}, got "
            f"{runtime} and {dtype}; no other graph of it is built"
        )


def taps_of(decoder: Decoder, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers whose outputs are handed out; None takes the default spread.

    Raises:
        ExportError: a layer that is not there, or layers out of order.
    """
    if wanted is None:
        return decoder.default_taps()
    if not wanted or any(not 0 <= layer <= decoder.last_tap for layer in wanted):
        raise ExportError(f"--target-layer-ids: expected layers from 0 to {decoder.last_tap}, got {list(wanted)}")
    if list(wanted) != sorted(set(wanted)):
        raise ExportError(f"--target-layer-ids: expected ascending layers without repeats, got {list(wanted)}")
    return wanted


def _without_tokenizer(path: Path, weights: WeightSource) -> TokenizerInfo:
    """Answers to token ids end, too, where the model's files say how."""
    return TokenizerInfo(
        bos_token_id=None,
        eos_token_ids=stated_ends(path, weights.config),
        add_bos=None,
        chat_template=None,
        bos_token=None,
        eos_token=None,
    )


def _write_tokenizer(path: Path, weights: WeightSource, directory: Path) -> TokenizerInfo | None:
    if isinstance(weights, GgufFile):
        return write_tokenizer(weights.reader, directory)
    return copy_tokenizer(path, directory)
