"""Export of a target model: checkpoint -> graph, tokenizer and stage.json, checked before it says done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dspark_backend.stages.artifact import TensorLocation, VerifierArtifact, save_artifact
from dspark_backend.stages.onnxruntime_verifier import MODEL_FILE
from dspark_export.check import check_verifier
from dspark_export.decoder import Decoder
from dspark_export.errors import ExportError
from dspark_export.families import describe
from dspark_export.gguf_tokenizer import write_tokenizer
from dspark_export.graph.tape import save_graph
from dspark_export.graph.verifier import EMBEDDING, HEAD, VerifierGraph
from dspark_export.hf_tokenizer import copy_tokenizer
from dspark_export.publish import Progress, file_digests, file_sizes, published, tool_versions
from dspark_export.source import open_weights, resolve_model, source_hash
from dspark_export.tokenizer_info import TokenizerInfo
from dspark_export.weights import WeightSource
from dspark_export.weights.gguf_file import GgufFile

DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_MAX_CONTEXT = 8192


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

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ExportError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.runtime != "onnxruntime":
            raise ExportError(f"--runtime: expected onnxruntime, got {self.runtime!r}")
        if self.max_context is not None and self.max_context < 2:
            raise ExportError(f"--max-context: expected at least 2, got {self.max_context}")


def export_verifier(options: VerifierExport, progress: Progress) -> VerifierArtifact:
    """Write the artifact into ``options.out``; nothing changes there unless everything succeeded.

    Raises:
        ExportError: the checkpoint is incomplete or of a kind we cannot build, or the graph fails its check.
    """
    path = resolve_model(options.model)
    weights = open_weights(path)
    decoder = describe(weights.config)
    taps = _taps(decoder, options.target_layer_ids)
    max_context = min(decoder.max_position, options.max_context or DEFAULT_MAX_CONTEXT)
    if options.max_context and options.max_context > decoder.max_position:
        raise ExportError(
            f"--max-context: expected at most the model's {decoder.max_position}, got {options.max_context}"
        )
    progress("hash the checkpoint", 0.0)
    digest = source_hash(weights.files)
    with published(options.out) as work:
        model = VerifierGraph(decoder, weights, taps, max_context, options.dtype).build()
        locations = save_graph(model, work, MODEL_FILE, lambda done: progress("write weights", done))
        tokenizer = _write_tokenizer(path, weights, work) or _without_tokenizer(weights)
        embedding = locations[EMBEDDING]
        artifact = VerifierArtifact(
            family=decoder.family,
            runtime=options.runtime,
            dtype=options.dtype,
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            num_layers=decoder.num_layers,
            num_heads=decoder.attention.num_heads,
            num_kv_heads=decoder.attention.num_kv_heads,
            head_dim=decoder.attention.head_dim,
            max_context=max_context,
            target_layer_ids=taps,
            embedding=embedding,
            head=_head(decoder, locations, embedding),
            eos_token_ids=tuple(tokenizer.eos_token_ids),
            bos_token_id=tokenizer.bos_token_id,
            add_bos=tokenizer.add_bos,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            chat_template=tokenizer.chat_template,
            source=path.name,
            source_hash=digest,
            tool_versions=tool_versions(),
            files=file_sizes(work),
            digests=file_digests(work),
        )
        save_artifact(artifact, work)
        progress("check the written graph", 0.0)
        check_verifier(work)
    return artifact


def _head(decoder: Decoder, locations: dict[str, TensorLocation], embedding: TensorLocation) -> TensorLocation:
    return embedding if decoder.tied_embedding else locations[HEAD]


def _taps(decoder: Decoder, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    if wanted is None:
        return decoder.default_taps()
    # The last layer's output has no later layer that a drafter could learn from (DESIGN: never the last layer).
    if not wanted or any(not 0 <= layer < decoder.num_layers - 1 for layer in wanted):
        raise ExportError(f"--target-layer-ids: expected layers from 0 to {decoder.num_layers - 2}, got {list(wanted)}")
    if list(wanted) != sorted(set(wanted)):
        raise ExportError(f"--target-layer-ids: expected ascending layers without repeats, got {list(wanted)}")
    return wanted


def _without_tokenizer(weights: WeightSource) -> TokenizerInfo:
    """Answers to token ids end, too, where config.json says how."""
    ends = weights.config.get("eos_token_id")
    return TokenizerInfo(
        bos_token_id=None,
        eos_token_ids=tuple(sorted(ends if isinstance(ends, list) else [] if ends is None else [ends])),
        add_bos=None,
        chat_template=None,
        bos_token=None,
        eos_token=None,
    )


def _write_tokenizer(path: Path, weights: WeightSource, directory: Path) -> TokenizerInfo | None:
    if isinstance(weights, GgufFile):
        return write_tokenizer(weights.reader, directory)
    return copy_tokenizer(path, directory)
