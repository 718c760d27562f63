"""The artifact directory of a stage: what ``dspark-export`` writes and every runtime reads.

``stage.json`` is written last, so that a directory which has one is complete.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dspark_backend.errors import ArtifactError

FORMAT_VERSION = 1
STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class VerifierArtifact:
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
    kind: str = "verifier"
    format_version: int = FORMAT_VERSION

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of float32 keys and values of one position over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 4

    def save(self, directory: Path) -> None:
        """Write ``stage.json`` into the directory."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / STAGE_FILE).write_text(text + "\n", encoding="utf-8")


def load_verifier_artifact(directory: Path) -> VerifierArtifact:
    """Read and check the artifact in a directory.

    Raises:
        ArtifactError: no stage.json, not one of a verifier, of another format, or a file is missing or of another size.
    """
    path = directory / STAGE_FILE
    hint = f"export the model again: dspark-export verifier --model MODEL --out {directory}"
    if not path.is_file():
        raise ArtifactError(f"{directory}: expected an exported verifier ({STAGE_FILE}), found none; {hint}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: expected JSON, got {error}; {hint}") from error
    artifact = _parse(path, raw, hint)
    for name, size in artifact.files.items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError(f"{directory}: {STAGE_FILE} names {name}, which is missing; {hint}")
        if file.stat().st_size != size:
            raise ArtifactError(
                f"{file}: expected {size} bytes as {STAGE_FILE} says, found {file.stat().st_size}; the file is "
                f"corrupt or of another export; {hint}"
            )
    return artifact


def _parse(path: Path, raw: Any, hint: str) -> VerifierArtifact:
    if not isinstance(raw, dict) or raw.get("kind") != "verifier":
        found = raw.get("kind") if isinstance(raw, dict) else type(raw).__name__
        raise ArtifactError(f"{path}: expected the kind 'verifier', got {found!r}; {hint}")
    if raw.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {raw.get('format_version')!r}; {hint}"
        )
    names = {field.name for field in fields(VerifierArtifact)}
    if missing := names - raw.keys():
        raise ArtifactError(f"{path}: expected the keys {', '.join(sorted(missing))}, which are missing; {hint}")
    values: dict[str, Any] = {name: tuple(raw[name]) if isinstance(raw[name], list) else raw[name] for name in names}
    return VerifierArtifact(**values)
