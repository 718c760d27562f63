"""What to serve and where: the settings of one server start."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_backend.errors import ConfigError

STAGE_MODELS = ("drafter", "verifier")
"""Models of our repository that serve an exported artifact alone, and are of no use without it."""
ARTIFACT_FILE = "stage.json"
"""What an exporter writes last: where it is, the artifact is complete."""
_NAMES_ARTIFACT = re.compile(r'^[^#\n]*key:\s*"artifact"', re.MULTILINE)


class PortInUse(ConfigError):
    """Another program listens on a port that the server needs."""


@dataclass(frozen=True)
class Ports:
    """TCP ports of one server.

    Raises:
        ConfigError: a port is outside 1 to 65535, or two are equal.
    """

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def __post_init__(self) -> None:
        for name, port in self.named():
            if not 1 <= port <= 65535:
                raise ConfigError(f"{name} port: expected 1 to 65535, got {port}")
        if len({self.http, self.grpc, self.metrics}) < 3:
            raise ConfigError(f"expected three different ports, got {self.http}, {self.grpc} and {self.metrics}")

    @classmethod
    def from_base(cls, base: int) -> Ports:
        """HTTP at ``base``, gRPC at the next port, metrics at the one after."""
        return cls(base, base + 1, base + 2)

    @classmethod
    def free(cls, host: str = "127.0.0.1") -> Ports:
        """Three ports in a row that nobody uses, below those that Linux hands out by itself: connections of others do
        not take them before a server does.

        Raises:
            PortInUse: there are none.
        """
        for base in random.SystemRandom().sample(range(20_000, 32_000, 3), 200):
            ports = cls.from_base(base)
            try:
                ports.check_free(host)
            except PortInUse:
                continue
            return ports
        raise PortInUse(f"no three free ports in a row from 20000 to 32000 on {host}; stop what listens there")

    def named(self) -> tuple[tuple[str, int], ...]:
        return (("http", self.http), ("grpc", self.grpc), ("metrics", self.metrics))

    def check_free(self, host: str) -> None:
        """Raises:
        PortInUse: names the first port that cannot be bound on ``host``.
        ConfigError: ``host`` is no IPv4 address or name of one.
        """
        try:
            socket.getaddrinfo(host, None, socket.AF_INET)
        except (socket.gaierror, UnicodeError) as error:
            raise ConfigError(
                f"host: expected an IPv4 address of this machine, or a name of one, got {host!r} ({error})"
            ) from error
        for name, port in self.named():
            try:
                socket.create_server((host, port)).close()
            except OSError as error:
                raise PortInUse(
                    f"port {port} ({name}) on {host} cannot be used ({os.strerror(error.errno or 0)}): stop the "
                    f"program that listens there, or choose other ports with --port-base or --{name}-port"
                ) from error


@dataclass(frozen=True)
class ServeOptions:
    """Settings of one server start.

    Raises:
        ConfigError: the repository is missing or holds no model, or a named model is not in it.
    """

    model_repository: Path
    ports: Ports = Ports()
    host: str = "0.0.0.0"
    """Address that the three services bind to."""
    models: tuple[str, ...] = ()
    """Load exactly these; empty loads the whole repository but for ``left_out``."""
    log_file: Path | None = None
    """Triton's and the models' output goes there (appended); None leaves it on this process's stderr."""
    exit_timeout_secs: int = 10
    """A stop waits this long for requests in flight."""
    strict_readiness: bool = True
    """Ready only when every model is."""
    extra: tuple[str, ...] = ()
    """Further arguments for tritonserver, as they are."""

    def __post_init__(self) -> None:
        if self.exit_timeout_secs < 0:
            raise ConfigError(f"exit timeout: expected seconds >= 0, got {self.exit_timeout_secs}")
        if not self.model_repository.is_dir():
            raise ConfigError(f"model repository: expected a folder with Triton models, got {self.model_repository}")
        present = repository_models(self.model_repository)
        if not present:
            raise ConfigError(
                f"model repository {self.model_repository}: expected folders with a config.pbtxt or a numbered "
                "version, found none"
            )
        for name in self.models:
            if name not in present:
                raise ConfigError(
                    f"model {name!r} is not in {self.model_repository}; it holds: {', '.join(sorted(present))}"
                )

    @property
    def left_out(self) -> tuple[str, ...]:
        """Models that are not loaded because nothing was exported for them; none where the caller chose by himself."""
        if self.models or any(argument.startswith("--model-control-mode") for argument in self.extra):
            return ()
        missing = [name for name in STAGE_MODELS if _lacks_artifact(self.model_repository / name)]
        # With nothing left Triton's own message is the better one.
        return tuple(missing) if set(missing) < repository_models(self.model_repository) else ()

    def arguments(self) -> Sequence[str]:
        """Command-line arguments for tritonserver, without the backend directory."""
        arguments = [
            f"--model-repository={self.model_repository}",
            f"--http-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.ports.metrics}",
            f"--exit-timeout-secs={self.exit_timeout_secs}",
            f"--strict-readiness={'true' if self.strict_readiness else 'false'}",
        ]
        models: Sequence[str] = self.models
        if left_out := self.left_out:
            models = sorted(repository_models(self.model_repository).difference(left_out))
        if models:
            arguments += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in models)]
        return [*arguments, *self.extra]


def repository_models(repository: Path) -> frozenset[str]:
    """Names of the folders in ``repository`` that Triton would take for models."""
    return frozenset(
        folder.name
        for folder in repository.iterdir()
        if folder.is_dir()
        and ((folder / "config.pbtxt").is_file() or any(part.name.isdigit() for part in folder.iterdir()))
    )


def _lacks_artifact(model: Path) -> bool:
    """Whether a stage model is there, but neither an artifact in a version of it nor a parameter that names one."""
    config = model / "config.pbtxt"
    if not config.is_file() or any(model.glob(f"*/{ARTIFACT_FILE}")):
        return False
    return _NAMES_ARTIFACT.search(config.read_text(encoding="utf-8", errors="replace")) is None
