"""The server of a load test: a real Triton for one pair of artifacts, alone on its ports."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dspark_backend.errors import DSparkError
from dspark_backend.serving.distribution import find_distribution
from dspark_backend.serving.launcher import TritonServer
from dspark_backend.serving.options import ARTIFACT_FILE, Ports, ServeOptions
from dspark_load.errors import LoadError

CHECKOUT = Path(__file__).resolve().parents[3]
START_SECS = 180.0


@dataclass(frozen=True)
class Pair:
    """Artifact folders of a verifier and its drafter."""

    verifier: Path
    drafter: Path

    def check(self) -> None:
        """Raises:
        LoadError: a folder holds no artifact.
        """
        for option, folder in (("--verifier", self.verifier), ("--drafter", self.drafter)):
            if not (folder / ARTIFACT_FILE).is_file():
                raise LoadError(
                    f"{option}: expected a folder with {ARTIFACT_FILE}, as dspark-export writes, got {folder}"
                )

    @property
    def block_size(self) -> int:
        size: int = json.loads((self.drafter / ARTIFACT_FILE).read_text(encoding="utf-8"))["block_size"]
        return size

    @property
    def key(self) -> str:
        """Tells one pair from another."""
        digest = hashlib.sha256()
        for folder in (self.verifier, self.drafter):
            digest.update((folder / ARTIFACT_FILE).read_bytes())
        return digest.hexdigest()[:12]


@contextmanager
def serve(pair: Pair, folder: Path, streams: int, threads: int, profile_seconds: float) -> Iterator[TritonServer]:
    """Start a server and wait until it can infer; stop it at the end.

    Every policy gets the same prompts, so prefix reuse is off: it would answer the later ones from its cache.

    Args:
        folder: for the repository, laid out afresh, measured step times (kept for the next start) and Triton's log.
        streams: the most that will ask at once; so many slots.
        threads: of the runtime; 0 is one a core.
        profile_seconds: most time to measure step times, where none are kept.

    Raises:
        LoadError: it did not start; with the lines of its log that tell why.
    """
    repository = folder / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    shutil.copytree(CHECKOUT / "model_repository" / "dspark", repository / "dspark")
    path = repository / "dspark" / "config.pbtxt"
    config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    settings = {
        "verifier": str(pair.verifier.resolve()),
        "drafter": str(pair.drafter.resolve()),
        "cost_cache": str((folder / "cost").resolve()),
        "max_slots": str(max(16, streams)),
        "threads": str(threads),
        "prefix_reuse": "false",
        "profile_seconds": str(profile_seconds),
    }
    for key, value in settings.items():
        config.parameters[key].string_value = value
    path.write_text(text_format.MessageToString(config), encoding="utf-8")
    options = ServeOptions(repository, Ports.free(), "127.0.0.1", log_file=folder / "triton.log")
    with ExitStack() as stack:
        try:
            server = stack.enter_context(TritonServer(options, find_distribution()))
            server.wait_until_serving("dspark", START_SECS)
        except DSparkError as error:
            raise LoadError(f"the server did not start: {error}") from error
        yield server
