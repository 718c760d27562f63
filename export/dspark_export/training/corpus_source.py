"""Whose text a corpus holds: a small file beside the shards."""

from __future__ import annotations

import json
from pathlib import Path

from dspark_backend.stages.artifact import VerifierArtifact
from dspark_export.errors import ExportError

SOURCE_FILE = "corpus.json"


def check_source(directory: Path, artifact: VerifierArtifact) -> None:
    """Note the target of a new corpus, or make sure that it is an old one's, whatever its precision.

    Raises:
        ExportError: the text, or its features, are of another target.
    """
    path = directory / SOURCE_FILE
    ours = {"source_hash": artifact.source_hash, "target_layer_ids": list(artifact.target_layer_ids)}
    if not path.is_file():
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs["source_hash"] != artifact.source_hash:
            what, wanted, got = "source hash", str(theirs["source_hash"])[:12], artifact.source_hash[:12]
        elif theirs["target_layer_ids"] != ours["target_layer_ids"]:
            what, wanted, got = "target layers", str(theirs["target_layer_ids"]), str(ours["target_layer_ids"])
        else:
            return
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: expected the source of a corpus, got {error}; begin another corpus") from error
    raise ExportError(
        f"--verifier: the corpus in {directory} was written by one with {what} {wanted}, this one's is {got}; give one "
        "exported from the same checkpoint with the same --target-layer-ids, or begin another corpus"
    )
