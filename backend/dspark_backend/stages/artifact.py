"""The artifact directory of a stage: what ``dspark-export`` writes and every runtime reads.

``stage.json`` is written last, so that a directory which has one is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dspark_backend.errors import ArtifactError
from dspark_backend.stages.batch import FloatArray
from dspark_backend.stages.engine_info import EngineInfo

FORMAT_VERSION = 4
STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class TensorLocation:
    """A tensor inside an artifact's data file, row-major and little-endian."""

    file: str
    offset: int
    """Bytes."""
    shape: tuple[int, ...]
    dtype: str
    """float32, float16 or bfloat16."""

    def read(self, directory: Path) -> FloatArray:
        """The tensor as float32; memory-mapped where it is stored so."""
        kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
        if self.dtype not in kinds:
            raise ArtifactError(f"{directory / self.file}: expected one of {', '.join(kinds)}, got {self.dtype!r}")
        stored = np.memmap(directory / self.file, kinds[self.dtype], "r", self.offset, self.shape)
        if self.dtype == "float32":
            return stored
        if self.dtype == "float16":
            return stored.astype(np.float32)
        # The upper half of a float32 is a bfloat16; numpy has no such type of its own.
        return (stored.astype(np.uint32) << 16).view(np.float32)


class _Sizes:
    """What follows from sizes that both kinds of artifact have."""

    runtime: str
    dtype: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_caches: tuple[tuple[int, int], ...]
    target_layer_ids: tuple[int, ...]

    @property
    def feature_size(self) -> int:
        """F: channels of a position's features, the outputs of the tapped layers side by side."""
        return len(self.target_layer_ids) * self.hidden_size

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(key/value heads, channels a head) of every layer's cache."""
        return self.layer_caches or ((self.num_kv_heads, self.head_dim),) * self.num_layers

    @property
    def group(self) -> int:
        """Query heads that share a key/value head, in the layer where they are fewest."""
        return self.num_heads // max(kv_heads for kv_heads, _ in self.cache_shapes)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one position over all layers."""
        item = 2 if self.runtime == "tensorrt" and self.dtype != "float32" else 4
        return sum(2 * kv_heads * head_dim * item for kv_heads, head_dim in self.cache_shapes)


@dataclass(frozen=True)
class VerifierArtifact(_Sizes):
    """Everything about an exported target model that is not in its graph."""

    family: str
    runtime: str
    dtype: str
    """Storage of the weights; the CPU runtime computes in float32."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    """Most positions of a sequence, prompt included."""
    target_layer_ids: tuple[int, ...]
    """Decoder layers whose outputs the graph hands out as features, in order."""
    embedding: TensorLocation
    """Token embedding [V, H]: a drafter shares it."""
    head: TensorLocation
    """LM head [V, H]: a drafter shares it; the embedding itself where the two are tied."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos: bool | None
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    source: str
    source_hash: str
    tool_versions: dict[str, str]
    files: dict[str, int]
    """Every other file of the artifact with its size in bytes."""
    digests: dict[str, str]
    """SHA-256 of each of them, 64 hex digits."""
    layer_caches: tuple[tuple[int, int], ...] = ()
    """(key/value heads, channels a head) of every layer; empty where all have num_kv_heads and head_dim."""
    engine: EngineInfo | None = None
    """For runtime tensorrt: its engines."""
    kind: str = "verifier"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class DrafterArtifact(_Sizes):
    """Everything about an exported drafter that is not in its graphs."""

    architecture: str
    runtime: str
    dtype: str
    block_size: int
    """gamma: tokens drafted a round."""
    vocab_size: int
    """Of the target."""
    draft_vocab_size: int
    """Tokens that can be proposed."""
    num_candidates: int
    """K: a draft is drawn from so many most probable tokens."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    target_layer_ids: tuple[int, ...]
    markov_head: str
    has_confidence: bool
    verifier_hash: str
    """source_hash of the verifier it was exported against."""
    source: str
    source_hash: str
    tool_versions: dict[str, str]
    files: dict[str, int]
    digests: dict[str, str]
    layer_caches: tuple[tuple[int, int], ...] = ()
    """As a verifier's."""
    variable_width: bool = False
    """Whether a round may have fewer slots than the block size, for less time; else it has all of them."""
    engine: EngineInfo | None = None
    """For runtime tensorrt: its engines."""
    kind: str = "drafter"
    format_version: int = FORMAT_VERSION


Artifact = TypeVar("Artifact", VerifierArtifact, DrafterArtifact)


def save_artifact(artifact: VerifierArtifact | DrafterArtifact, directory: Path) -> None:
    """Write ``stage.json`` into the directory."""
    text = json.dumps(asdict(artifact), indent=2, ensure_ascii=False)
    (directory / STAGE_FILE).write_text(text + "\n", encoding="utf-8")


def load_verifier_artifact(directory: Path, check_contents: bool = True) -> VerifierArtifact:
    """Read and check the artifact in a directory. ``check_contents=False`` spares reading files checked just before.

    Raises:
        ArtifactError: no stage.json, not one of a verifier, of another format, or a file is missing or damaged.
    """
    hint = f"export the model again: dspark-export verifier --model MODEL --out {directory}"
    return _load(directory, VerifierArtifact, hint, check_contents)


def load_drafter_artifact(directory: Path, check_contents: bool = True) -> DrafterArtifact:
    """Read and check the artifact in a directory. Raises ArtifactError as for a verifier."""
    hint = f"export it again: dspark-export drafter --checkpoint PATH --verifier DIR --out {directory}"
    return _load(directory, DrafterArtifact, hint, check_contents)


def mismatch(
    source: str, vocab_size: int, hidden_size: int, target_layer_ids: Sequence[int], verifier: VerifierArtifact
) -> str | None:
    """Why a drafter does not belong to a verifier, naming both sides; None where nothing speaks against it."""
    taps = list(target_layer_ids)
    advice = "use the drafter made for this model"
    for what, drafter_has, verifier_has, remedy in (
        ("vocab_size", vocab_size, verifier.vocab_size, advice),
        ("hidden_size", hidden_size, verifier.hidden_size, advice),
        (
            "target_layer_ids",
            taps,
            list(verifier.target_layer_ids),
            f"export the verifier with --target-layer-ids {','.join(map(str, taps))}",
        ),
    ):
        if drafter_has != verifier_has:
            return (
                f"drafter {source} does not fit verifier {verifier.source}: the drafter has {what} {drafter_has}, "
                f"the verifier {verifier_has}; {remedy}"
            )
    return None


def check_pair(drafter: DrafterArtifact, verifier: VerifierArtifact) -> None:
    """Make sure that a drafter belongs to a verifier.

    Raises:
        ArtifactError: they differ in something that both must share, or the drafter was exported against another one or
            is for shorter sequences.
    """
    reason = mismatch(drafter.source, drafter.vocab_size, drafter.hidden_size, drafter.target_layer_ids, verifier)
    if reason is not None:
        raise ArtifactError(reason)
    if drafter.verifier_hash != verifier.source_hash:
        raise ArtifactError(
            f"drafter {drafter.source} was exported against a verifier with source hash {drafter.verifier_hash[:12]}, "
            f"this one ({verifier.source}) has {verifier.source_hash[:12]}; export the drafter again"
        )
    # Both may be of one checkpoint, exported with another --max-context: beyond its own the drafter has no positions.
    if drafter.max_context < verifier.max_context:
        raise ArtifactError(
            f"drafter {drafter.source}: expected one for sequences of {verifier.max_context} tokens, as this verifier "
            f"({verifier.source}), got {drafter.max_context}; export the drafter again"
        )


_JSON_TYPES: dict[str, type] = {"int": int, "str": str, "bool": bool, "dict": dict, "tuple": list}
"""Type in the dataclass -> type in JSON, for fields that cannot be null."""


def _load(directory: Path, kind: type[Artifact], hint: str, check_contents: bool) -> Artifact:
    path = directory / STAGE_FILE
    name = str(kind.__dataclass_fields__["kind"].default)
    if not path.is_file():
        raise ArtifactError(f"{directory}: expected an exported {name} ({STAGE_FILE}), found none; {hint}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: expected JSON, got {error}; {hint}") from error
    if not isinstance(raw, dict) or raw.get("kind") != name:
        found = raw.get("kind") if isinstance(raw, dict) else type(raw).__name__
        raise ArtifactError(f"{path}: expected the kind {name!r}, got {found!r}; {hint}")
    if raw.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {raw.get('format_version')!r}; {hint}"
        )
    present = [field for field in fields(kind) if field.name in raw]
    names = {field.name for field in present}
    if missing := {field.name for field in fields(kind) if field.default is MISSING} - names:
        raise ArtifactError(f"{path}: expected the keys {', '.join(sorted(missing))}, which are missing; {hint}")
    for field in present:
        wanted = _JSON_TYPES.get(str(field.type).split("[")[0], object)
        # bool is an int to Python, but no size.
        if not isinstance(raw[field.name], wanted) or (wanted is int and isinstance(raw[field.name], bool)):
            raise ArtifactError(f"{path}: {field.name}: expected {wanted.__name__}, got {raw[field.name]!r}; {hint}")
    try:
        artifact = kind(**{key: _value(key, raw[key]) for key in names})
    except ValueError as error:
        raise ArtifactError(
            f"{path}: layer_caches or engine: expected integers where there are others ({error}); {hint}"
        ) from error
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: a tensor's location is incomplete ({error!r}); {hint}") from error
    shapes = artifact.cache_shapes
    if len(shapes) != artifact.num_layers or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ArtifactError(f"{path}: layer_caches: expected two sizes for each layer, got {shapes}; {hint}")
    _check_files(directory, artifact, hint, check_contents)
    return artifact


def _check_files(directory: Path, artifact: VerifierArtifact | DrafterArtifact, hint: str, contents: bool) -> None:
    for file_name, size in artifact.files.items():
        file = directory / file_name
        if not file.is_file():
            raise ArtifactError(f"{directory}: {STAGE_FILE} names {file_name}, which is missing; {hint}")
        if file.stat().st_size != size:
            raise ArtifactError(
                f"{file}: expected {size} bytes as {STAGE_FILE} says, found {file.stat().st_size}; the file is "
                f"corrupt or of another export; {hint}"
            )
        if not contents:
            continue
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != artifact.digests.get(file_name):
                raise ArtifactError(
                    f"{file}: expected the contents that {STAGE_FILE} names by their SHA-256, found others; the file "
                    f"is corrupt or of another export; {hint}"
                )


def _value(key: str, raw: Any) -> Any:
    if key == "layer_caches":
        return tuple((int(kv_heads), int(head_dim)) for kv_heads, head_dim in raw)
    if isinstance(raw, list):
        return tuple(raw)
    if key == "engine":
        return None if raw is None else EngineInfo.of(raw)
    if key in ("embedding", "head"):
        return TensorLocation(raw["file"], raw["offset"], tuple(raw["shape"]), raw["dtype"])
    return raw
