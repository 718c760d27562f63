"""A real Triton for one pair of artifacts, on a temporary model repository."""

from __future__ import annotations

import hashlib
import shutil
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dspark_backend.serving.distribution import find_distribution
from dspark_backend.serving.launcher import TritonServer
from dspark_backend.serving.options import ARTIFACT_FILE, Ports, ServeOptions

CHECKOUT = Path(__file__).resolve().parents[3]
START_SECS = 180.0


@dataclass(frozen=True)
class Precision:
    """A verifier and its drafter, under the name that the tables give them."""

    name: str
    verifier: Path
    drafter: Path

    @classmethod
    def parse(cls, text: str) -> Precision:
        """From ``NAME=VERIFIER_DIR,DRAFTER_DIR``.

        Raises:
            ArgumentTypeError: another form, or a folder that holds no artifact.
        """
        name, equals, folders = text.partition("=")
        verifier, comma, drafter = folders.partition(",")
        if not (name and equals and comma):
            raise ArgumentTypeError(f"expected NAME=VERIFIER_DIR,DRAFTER_DIR, got {text!r}")
        for folder in (verifier, drafter):
            if not (Path(folder) / ARTIFACT_FILE).is_file():
                raise ArgumentTypeError(f"expected an exported artifact with {ARTIFACT_FILE} in {folder!r}")
        return cls(name, Path(verifier).resolve(), Path(drafter).resolve())

    @property
    def key(self) -> str:
        """Tells one pair of artifacts from another."""
        digest = hashlib.sha256()
        for folder in (self.verifier, self.drafter):
            digest.update((folder / ARTIFACT_FILE).read_bytes())
        return digest.hexdigest()[:12]


@contextmanager
def serve(precision: Precision, folder: Path, cost_cache: Path, streams: int, threads: int) -> Iterator[TritonServer]:
    """Start a server and wait until it can infer; stop it at the end.

    Prompts are repeated from cell to cell, so prefix reuse is off: it would answer the later ones from its cache.

    Args:
        folder: for the repository, laid out afresh, and Triton's log.
        cost_cache: where measured step times are kept; a second start takes them from there.
        streams: the most that will ask at once.
        threads: of the runtime; 0 is one a core.
    """
    repository = folder / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(CHECKOUT / "model_repository" / "dspark", repository / "dspark")
    path = repository / "dspark" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    settings = {
        "verifier": str(precision.verifier),
        "drafter": str(precision.drafter),
        "cost_cache": str(cost_cache.resolve()),
        "max_slots": str(max(16, streams)),
        "threads": str(threads),
        "prefix_reuse": "false",
    }
    for key, value in settings.items():
        config.parameters[key].string_value = value
    path.write_text(text_format.MessageToString(config))
    options = ServeOptions(repository, Ports.free(), "127.0.0.1", log_file=folder / "triton.log")
    with TritonServer(options, find_distribution()) as server:
        server.wait_until_serving("dspark", START_SECS)
        yield server
